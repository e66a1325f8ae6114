"""Generate checkpoints: real Hugging Face layouts, random weights, no hub.

A checkpoint is described by a frozen :class:`CheckpointSpec` and written once per cache folder by :func:`build`:

    spec = CheckpointSpec("qwen3_moe", size="tiny", files=4, assignment="round_robin")
    path = build(spec, Path("cache"))

The steps are: family and size give a ``config.json`` (:func:`model_config`); the config gives the list of tensors
(:func:`tensor_plans`); the spec assigns tensors to files (:func:`file_plan`); each file is written tensor by tensor,
so memory stays near one tensor however large the checkpoint is.

Values: every tensor is a slice of one random block, times its own scale, times a scale per row. No two experts, rows or
shards (gate and up; q, k and v) share a scale, so a slice in the wrong place shows in the bytes and in the quantization
scales. The scales keep activations near one, so logits are finite.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from sglang_overlay.offline.export.weight_file import Entry, as_bytes, header
from sglang_overlay.safetensors_format import INDEX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tokenizers import Tokenizer

Family = Literal["qwen3", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"]
Assignment = Literal["sequential", "round_robin", "shuffled"]
FileNames = Literal["ordered", "shuffled"]
Container = Literal["safetensors", "bin"]
Stored = Literal["bf16", "fp8", "fp8_block"]
Config = dict[str, Any]

FAMILIES: tuple[Family, ...] = ("qwen3", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")

# Part of every cache key: raise it when the bytes written for an unchanged spec change.
_FORMAT = 1

_VOCAB_SIZE = 512
_BLOCK_ELEMENTS = 1 << 22
_FP8_MAX = 448.0
_FP8_BLOCK = 128


@dataclass(frozen=True)
class CheckpointSpec:
    """What to build. Equal specs give equal bytes.

    Args:
        family: model family; decides architecture, config keys and tensor names.
        size: a key of :data:`SIZES` for that family: ``tiny`` (a few MB), ``demo`` (about 1 GB), ``bench_2g`` and
            ``bench_4g`` (at least 2 GB and 4 GB in bf16, 64 experts a layer), ``bench`` (layers of 0.1 to 0.3 GB, as
            many as ``overrides`` ask for).
        overrides: ``(config key, value)`` pairs laid over the size's ``config.json``, e.g.
            ``(("num_hidden_layers", 4),)``.
        files: number of weight files. One file has no index, as Hugging Face writes it.
        assignment: how tensors go to files. ``sequential`` fills files in model order, ``round_robin`` puts an
            expert's gate, up and down projection in different files, ``shuffled`` is a seeded random assignment.
        file_names: ``ordered``, or ``shuffled``: the same files under permuted numbers, so that reading them in
            sorted order is not model order.
        container: ``safetensors`` or ``bin`` (``torch.save``).
        stored: ``bf16``; ``fp8`` (serialized, one scale per tensor) or ``fp8_block`` (128 x 128 blocks, as DeepSeek-V3
            is published), for runs in which nothing may stream.
        tied_embeddings: no ``lm_head.weight``; the config says so.
        seed: seed of every random choice.
    """

    family: Family
    size: str = "tiny"
    overrides: tuple[tuple[str, Any], ...] = ()
    files: int = 1
    assignment: Assignment = "sequential"
    file_names: FileNames = "ordered"
    container: Container = "safetensors"
    stored: Stored = "bf16"
    tied_embeddings: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; one of {', '.join(FAMILIES)}")
        if self.size not in SIZES[self.family]:
            raise ValueError(f"{self.family} has no size {self.size!r}; one of {', '.join(SIZES[self.family])}")
        if self.files < 1:
            raise ValueError(f"files must be at least 1, not {self.files}")

    @property
    def key(self) -> str:
        """Content hash of everything that decides the bytes written; 12 hex digits."""
        described = json.dumps({"format": _FORMAT, "config": model_config(self), **asdict(self)}, sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the checkpoint.

    ``kind`` is ``linear`` (may be stored as fp8), ``matrix`` (always bf16: embeddings, routers), ``norm`` (around
    one) or ``bias`` (around zero).
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["linear", "matrix", "norm", "bias"] = "linear"
    dtype: torch.dtype = torch.bfloat16

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# ---------------------------------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------------------------------

_COMMON: Config = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "vocab_size": _VOCAB_SIZE,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "attention_dropout": 0.0,
    "attention_bias": False,
}
_QWEN: Config = {"use_sliding_window": False, "sliding_window": None, "max_window_layers": 0, "rope_scaling": None}
# An eighth of DeepSeek's own 163840 positions: the rope table, with a row for each, would be larger than a tiny model.
_YARN_FACTOR = 40
_YARN_POSITIONS = 20480
_DEEPSEEK: Config = {
    "max_position_embeddings": _YARN_POSITIONS,
    "ep_size": 1,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "pretraining_tp": 1,
    "num_nextn_predict_layers": 0,
}


def _yarn(mscale: float) -> Config:
    return {
        "type": "yarn",
        "factor": _YARN_FACTOR,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
        "original_max_position_embeddings": _YARN_POSITIONS // _YARN_FACTOR,
    }


_FAMILY_CONFIG: dict[Family, Config] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **_QWEN},
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **_QWEN,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
        "qkv_bias": True,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **_QWEN,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
        "output_router_logits": False,
    },
    "deepseek_v2": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        **_DEEPSEEK,
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_scaling": _yarn(0.707),
    },
    "deepseek_v3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **_DEEPSEEK,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "rope_scaling": _yarn(1.0),
    },
}


def _qwen_dims(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int) -> Config:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": 2 * hidden,
    }


def _qwen_moe_dims(base: Config, experts: int, per_token: int, width: int) -> Config:
    return {**base, "num_experts": experts, "num_experts_per_tok": per_token, "moe_intermediate_size": width}


def _mla_dims(layers: int, hidden: int, heads: int, head_dim: int, kv_lora: int) -> Config:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "qk_nope_head_dim": head_dim,
        "qk_rope_head_dim": head_dim // 2,
        "v_head_dim": head_dim,
        "kv_lora_rank": kv_lora,
        "intermediate_size": 2 * hidden,
    }


def _deepseek_moe_dims(base: Config, experts: int, per_token: int, width: int, shared: int) -> Config:
    return {
        **base,
        "n_routed_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": width,
        "n_shared_experts": shared,
    }


def _v3(base: Config, q_lora: int, groups: int, kept_groups: int) -> Config:
    return {**base, "q_lora_rank": q_lora, "n_group": groups, "topk_group": kept_groups}


_QWEN_TINY = _qwen_dims(3, 256, 4, 2, 64)
_QWEN_1024 = _qwen_dims(6, 1024, 16, 4, 64)

SIZES: dict[Family, dict[str, Config]] = {
    "qwen3": {
        "tiny": {**_QWEN_TINY, "intermediate_size": 384},
        "demo": {**_qwen_dims(16, 2048, 16, 8, 128), "intermediate_size": 4096},
        "bench": {**_qwen_dims(1, 2048, 16, 8, 128), "intermediate_size": 8192},
    },
    "qwen2_moe": {
        "tiny": {**_qwen_moe_dims(_QWEN_TINY, 8, 2, 128), "shared_expert_intermediate_size": 192},
        "demo": {**_qwen_moe_dims(_QWEN_1024, 48, 4, 512), "shared_expert_intermediate_size": 2048},
    },
    "qwen3_moe": {
        "tiny": _qwen_moe_dims(_QWEN_TINY, 8, 2, 128),
        "demo": _qwen_moe_dims(_QWEN_1024, 48, 4, 512),
        "bench_2g": _qwen_moe_dims(_qwen_dims(4, 2048, 32, 4, 128), 64, 8, 768),
        "bench_4g": _qwen_moe_dims(_qwen_dims(7, 2048, 32, 4, 128), 64, 8, 768),
        "bench": _qwen_moe_dims(_qwen_dims(1, 2048, 32, 4, 128), 32, 8, 768),
    },
    "deepseek_v2": {
        "tiny": _deepseek_moe_dims(_mla_dims(3, 256, 4, 64, 128), 8, 2, 128, 2),
        "demo": _deepseek_moe_dims(_mla_dims(6, 1024, 16, 64, 256), 64, 4, 512, 2),
    },
    "deepseek_v3": {
        "tiny": _v3(_deepseek_moe_dims(_mla_dims(3, 256, 4, 64, 128), 8, 2, 128, 1), 128, 4, 2),
        "demo": _v3(_deepseek_moe_dims(_mla_dims(6, 1024, 16, 64, 256), 64, 4, 512, 1), 512, 8, 4),
        "bench_2g": _v3(_deepseek_moe_dims(_mla_dims(9, 1024, 16, 64, 512), 64, 8, 768, 1), 512, 8, 4),
        "bench_4g": _v3(_deepseek_moe_dims(_mla_dims(8, 2048, 16, 128, 512), 64, 8, 768, 1), 768, 8, 4),
        "bench": _v3(_deepseek_moe_dims(_mla_dims(2, 2048, 16, 128, 512), 32, 8, 768, 1), 768, 8, 4),
    },
}

_QUANTIZATION_CONFIG: dict[Stored, Config] = {
    "bf16": {},
    "fp8": {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
    "fp8_block": {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_FP8_BLOCK, _FP8_BLOCK],
        }
    },
}


def model_config(spec: CheckpointSpec) -> Config:
    """The ``config.json`` of `spec`, with the keys the family's published checkpoints have."""
    return {
        **_COMMON,
        **_FAMILY_CONFIG[spec.family],
        **SIZES[spec.family][spec.size],
        **_QUANTIZATION_CONFIG[spec.stored],
        "tie_word_embeddings": spec.tied_embeddings,
        **dict(spec.overrides),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tensor names and shapes
# ---------------------------------------------------------------------------------------------------------------------


def tensor_plans(spec: CheckpointSpec) -> list[TensorPlan]:
    """Every tensor of `spec` in model order, under the names published checkpoints of the family use."""
    config = model_config(spec)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    plans = [TensorPlan("model.embed_tokens.weight", (vocab, hidden), "matrix")]
    for layer in range(config["num_hidden_layers"]):
        plans += _decoder_layer(config, layer)
    plans.append(TensorPlan("model.norm.weight", (hidden,), "norm"))
    if not config["tie_word_embeddings"]:
        plans.append(TensorPlan("lm_head.weight", (vocab, hidden), "matrix"))
    for offset in range(config.get("num_nextn_predict_layers", 0)):
        plans += _nextn_layer(config, config["num_hidden_layers"] + offset)
    return plans


def _decoder_layer(config: Config, layer: int) -> list[TensorPlan]:
    prefix, hidden = f"model.layers.{layer}", config["hidden_size"]
    attention = _mla_attention if "kv_lora_rank" in config else _qwen_attention
    return [
        TensorPlan(f"{prefix}.input_layernorm.weight", (hidden,), "norm"),
        *attention(config, f"{prefix}.self_attn"),
        TensorPlan(f"{prefix}.post_attention_layernorm.weight", (hidden,), "norm"),
        *_mlp(config, f"{prefix}.mlp", layer),
    ]


def _nextn_layer(config: Config, layer: int) -> list[TensorPlan]:
    """DeepSeek-V3's multi-token prediction layer, stored past the last decoder layer."""
    prefix, hidden, vocab = f"model.layers.{layer}", config["hidden_size"], config["vocab_size"]
    return [
        TensorPlan(f"{prefix}.embed_tokens.weight", (vocab, hidden), "matrix"),
        TensorPlan(f"{prefix}.enorm.weight", (hidden,), "norm"),
        TensorPlan(f"{prefix}.hnorm.weight", (hidden,), "norm"),
        TensorPlan(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), "matrix"),
        *_decoder_layer(config, layer),
        TensorPlan(f"{prefix}.shared_head.norm.weight", (hidden,), "norm"),
        TensorPlan(f"{prefix}.shared_head.head.weight", (vocab, hidden), "matrix"),
    ]


def _qwen_attention(config: Config, prefix: str) -> list[TensorPlan]:
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    q_rows, kv_rows = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    plans = []
    for name, rows in (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows)):
        plans.append(TensorPlan(f"{prefix}.{name}.weight", (rows, hidden)))
        if config["model_type"] == "qwen2_moe":
            plans.append(TensorPlan(f"{prefix}.{name}.bias", (rows,), "bias"))
    plans.append(TensorPlan(f"{prefix}.o_proj.weight", (hidden, q_rows)))
    if config["model_type"] != "qwen2_moe":
        plans.append(TensorPlan(f"{prefix}.q_norm.weight", (head_dim,), "norm"))
        plans.append(TensorPlan(f"{prefix}.k_norm.weight", (head_dim,), "norm"))
    return plans


def _mla_attention(config: Config, prefix: str) -> list[TensorPlan]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rows = heads * (config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    kv_rows = heads * (config["qk_nope_head_dim"] + config["v_head_dim"])
    q_lora, kv_lora = config["q_lora_rank"], config["kv_lora_rank"]
    if q_lora is None:
        query = [TensorPlan(f"{prefix}.q_proj.weight", (q_rows, hidden))]
    else:
        query = [
            TensorPlan(f"{prefix}.q_a_proj.weight", (q_lora, hidden)),
            TensorPlan(f"{prefix}.q_a_layernorm.weight", (q_lora,), "norm"),
            TensorPlan(f"{prefix}.q_b_proj.weight", (q_rows, q_lora)),
        ]
    return [
        *query,
        TensorPlan(f"{prefix}.kv_a_proj_with_mqa.weight", (kv_lora + config["qk_rope_head_dim"], hidden)),
        TensorPlan(f"{prefix}.kv_a_layernorm.weight", (kv_lora,), "norm"),
        TensorPlan(f"{prefix}.kv_b_proj.weight", (kv_rows, kv_lora)),
        TensorPlan(f"{prefix}.o_proj.weight", (hidden, heads * config["v_head_dim"])),
    ]


def _mlp(config: Config, prefix: str, layer: int) -> list[TensorPlan]:
    experts = int(config.get("num_experts", 0) or config.get("n_routed_experts", 0))
    if experts == 0 or layer < config.get("first_k_dense_replace", 0):
        return _gated(prefix, config["hidden_size"], config["intermediate_size"])
    plans = [TensorPlan(f"{prefix}.gate.weight", (experts, config["hidden_size"]), "matrix")]
    if config.get("topk_method") == "noaux_tc":
        plans.append(TensorPlan(f"{prefix}.gate.e_score_correction_bias", (experts,), "bias", torch.float32))
    for expert in range(experts):
        plans += _gated(f"{prefix}.experts.{expert}", config["hidden_size"], config["moe_intermediate_size"])
    return plans + _shared_experts(config, prefix)


def _shared_experts(config: Config, prefix: str) -> list[TensorPlan]:
    hidden = config["hidden_size"]
    if "shared_expert_intermediate_size" in config:
        return [
            *_gated(f"{prefix}.shared_expert", hidden, config["shared_expert_intermediate_size"]),
            TensorPlan(f"{prefix}.shared_expert_gate.weight", (1, hidden), "matrix"),
        ]
    if config.get("n_shared_experts"):
        return _gated(f"{prefix}.shared_experts", hidden, config["n_shared_experts"] * config["moe_intermediate_size"])
    return []


def _gated(prefix: str, hidden: int, width: int) -> list[TensorPlan]:
    return [
        TensorPlan(f"{prefix}.gate_proj.weight", (width, hidden)),
        TensorPlan(f"{prefix}.up_proj.weight", (width, hidden)),
        TensorPlan(f"{prefix}.down_proj.weight", (hidden, width)),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)
def _random_block(seed: int) -> torch.Tensor:
    """One block of standard normal bf16 values that all tensors are cut from, shape [_BLOCK_ELEMENTS]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_BLOCK_ELEMENTS, generator=generator).to(torch.bfloat16)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def _cut(block: torch.Tensor, offset: int, elements: int) -> torch.Tensor:
    """`elements` values of the endlessly repeated `block`, from `offset`; a new tensor of shape [elements]."""
    out = torch.empty(elements, dtype=block.dtype)
    filled = 0
    while filled < elements:
        start = (offset + filled) % block.numel()
        count = min(elements - filled, block.numel() - start)
        out[filled : filled + count] = block[start : start + count]
        filled += count
    return out


def make_tensor(plan: TensorPlan, seed: int) -> torch.Tensor:
    """The values of `plan`: same seed and name, same bytes, whatever file they end up in.

    A matrix of shape [rows, columns] has standard deviation ``t * r[row] / sqrt(columns)`` with ``t`` and each ``r``
    drawn log-uniformly from [1/2, 2]. Norms are uniform in [0.75, 1.25], biases normal with deviation 0.1.
    """
    generator = torch.Generator().manual_seed(_seed_of(seed, plan.name))
    if plan.kind == "norm":
        return (0.75 + 0.5 * torch.rand(plan.shape, generator=generator)).to(plan.dtype)
    if plan.kind == "bias":
        return (0.1 * torch.randn(plan.shape, generator=generator)).to(plan.dtype)
    rows, columns = plan.shape
    offset = int(torch.randint(_BLOCK_ELEMENTS, (1,), generator=generator))
    exponents = 2.0 * torch.rand(rows + 1, generator=generator) - 1.0
    row_scale = torch.exp2(exponents[:1] + exponents[1:]) / math.sqrt(columns)
    values = _cut(_random_block(seed), offset, rows * columns).view(rows, columns)
    return values.mul_(row_scale.to(torch.bfloat16).unsqueeze(1))


# ---------------------------------------------------------------------------------------------------------------------
# Serialized fp8
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One stored tensor: `make` creates it just before it is written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor] = field(compare=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _entries(plan: TensorPlan, spec: CheckpointSpec) -> list[_Entry]:
    def values() -> torch.Tensor:
        return make_tensor(plan, spec.seed)

    if spec.stored == "bf16" or plan.kind != "linear":
        return [_Entry(plan.name, plan.shape, plan.dtype, values)]
    quantize = _quantize_tensor if spec.stored == "fp8" else _quantize_blocks
    scale_name = plan.name + ("_scale" if spec.stored == "fp8" else "_scale_inv")
    scale_shape = () if spec.stored == "fp8" else tuple(-(-size // _FP8_BLOCK) for size in plan.shape)
    return [
        _Entry(plan.name, plan.shape, torch.float8_e4m3fn, lambda: quantize(values())[0]),
        _Entry(scale_name, scale_shape, torch.float32, lambda: quantize(values())[1]),
    ]


def _quantize_tensor(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] bf16 -> fp8 of the same shape and one float32 scale of shape [] with values = fp8 * scale."""
    scale = values.float().abs().max() / _FP8_MAX
    return (values.float() / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn), scale


def _quantize_blocks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, columns] bf16 -> fp8 of the same shape and float32 scales [ceil(rows/128), ceil(columns/128)]."""
    rows, columns = values.shape
    padding = (0, -columns % _FP8_BLOCK, 0, -rows % _FP8_BLOCK)
    padded = torch.nn.functional.pad(values.float(), padding)
    blocks = padded.view(padded.shape[0] // _FP8_BLOCK, _FP8_BLOCK, padded.shape[1] // _FP8_BLOCK, _FP8_BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / _FP8_MAX
    scaled = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return scaled.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).contiguous(), scale


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def file_plan(spec: CheckpointSpec) -> dict[str, list[str]]:
    """File name -> names of the tensors in it, in the order written. Every file has at least one tensor."""
    return {name: [entry.name for entry in entries] for name, entries in _assign(spec).items()}


def _assign(spec: CheckpointSpec) -> dict[str, list[_Entry]]:
    entries = [entry for plan in tensor_plans(spec) for entry in _entries(plan, spec)]
    if spec.files > len(entries):
        raise ValueError(f"{spec.files} files for {len(entries)} tensors; ask for fewer files")
    groups: list[list[_Entry]] = [[] for _ in range(spec.files)]
    for entry, number in zip(entries, _file_numbers(spec, entries), strict=True):
        groups[number].append(entry)
    return dict(zip(_names_of_files(spec), groups, strict=True))


def _file_numbers(spec: CheckpointSpec, entries: list[_Entry]) -> list[int]:
    """The file of each entry, 0 .. files-1."""
    if spec.assignment == "sequential":
        return _fill_in_order([entry.nbytes for entry in entries], spec.files)
    numbers = [position % spec.files for position in range(len(entries))]
    if spec.assignment == "shuffled":
        random.Random(spec.seed).shuffle(numbers)
    return numbers


def _fill_in_order(sizes: list[int], files: int) -> list[int]:
    """File numbers with nearly equal bytes per file, order kept, no file empty."""
    total, before, number, numbers = sum(sizes), 0, 0, []
    for position, size in enumerate(sizes):
        due = min(files - 1, before * files // total)
        must = files - (len(sizes) - position)
        number = max(number, min(due, number + 1), min(must, number + 1))
        numbers.append(number)
        before += size
    return numbers


def _names_of_files(spec: CheckpointSpec) -> list[str]:
    stem, suffix = ("model", "safetensors") if spec.container == "safetensors" else ("pytorch_model", "bin")
    if spec.files == 1:
        return [f"{stem}.{suffix}"]
    numbers = list(range(1, spec.files + 1))
    if spec.file_names == "shuffled":
        numbers = _moved(numbers, random.Random(spec.seed))
    return [f"{stem}-{number:05d}-of-{spec.files:05d}.{suffix}" for number in numbers]


def _moved(numbers: list[int], chance: random.Random) -> list[int]:
    """A permutation of at least two numbers which is not the identity."""
    shuffled = list(numbers)
    while shuffled == numbers:
        chance.shuffle(shuffled)
    return shuffled


def _write_safetensors(path: Path, entries: list[_Entry]) -> None:
    """Write `entries` one at a time, so memory stays near one tensor (``save_file`` needs all tensors of a file)."""
    with path.open("wb") as file:
        file.write(header([Entry(entry.name, entry.shape, entry.dtype) for entry in entries]))
        for entry in entries:
            file.write(as_bytes(entry.make()))


def _write_bin(path: Path, entries: list[_Entry]) -> None:
    torch.save({entry.name: entry.make() for entry in entries}, path)


def _write_index(folder: Path, spec: CheckpointSpec, files: dict[str, list[_Entry]]) -> None:
    name = INDEX if spec.container == "safetensors" else "pytorch_model.bin.index.json"
    weight_map = {entry.name: file for file, entries in files.items() for entry in entries}
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    _write_json(folder / name, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _letter_pairs(count: int) -> Iterator[tuple[str, str]]:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = ((first, second) for first in letters for second in letters)
    return itertools.islice(pairs, count)


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE: special tokens, the 256 bytes, then letter pairs until `vocab_size` (at most 935) is full.

    Any text encodes, and with ``vocab_size`` in [259, 935] every id a model can emit decodes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(_letter_pairs(vocab_size - len(SPECIAL_TOKENS) - len(alphabet)))
    tokens = [*SPECIAL_TOKENS, *alphabet, *(first + second for first, second in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, with the chat template."""
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 4096,
            "chat_template": CHAT_TEMPLATE,
        },
    )


# ---------------------------------------------------------------------------------------------------------------------
# Build
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_path(spec: CheckpointSpec, folder: Path) -> Path:
    """Where :func:`build` puts `spec` under the cache `folder`."""
    return folder / f"{spec.family}-{spec.size}-{spec.key}"


def build(spec: CheckpointSpec, folder: Path) -> Path:
    """Write `spec` under the cache `folder` unless it is there already, and return its path.

    The checkpoint appears in one rename, so an interrupted build leaves nothing that looks finished, and processes
    building the same spec at the same time do not disturb each other.
    """
    path = checkpoint_path(spec, folder)
    if path.is_dir():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as scratch:
        draft = Path(scratch) / path.name
        draft.mkdir()
        _write(spec, draft)
        _publish(draft, path)
    return path


def _publish(draft: Path, path: Path) -> None:
    try:
        draft.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        shutil.rmtree(draft)


@contextlib.contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Make torch compute with ``number`` threads, in this thread and in those it starts."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write(spec: CheckpointSpec, folder: Path) -> None:
    config = model_config(spec)
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "do_sample": False}
    _write_json(folder / "generation_config.json", generation)
    _write_tokenizer(folder, config["vocab_size"])
    files = _assign(spec)
    write = _write_safetensors if spec.container == "safetensors" else _write_bin
    # One thread per file: tensors are too small for torch's own threads.
    with torch_threads(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, (folder / name for name in files), files.values()))
    if spec.files > 1:
        _write_index(folder, spec, files)
