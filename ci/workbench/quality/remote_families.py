"""Tiny checkpoints of architectures that ``transformers`` does not have, since their code came with checkpoints.

Configs use the model type ``llama``, whose config class keeps unknown keys. Names are those of published checkpoints,
listed in a :class:`Naming`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.loads.checkpoints import TensorPlan, make_tensor

_LAYERS, _HIDDEN, _VOCAB = 2, 128, 512
_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 32
_WIDTH, _EXPERT_WIDTH, _EXPERTS = 256, 96, 4
_QUERY, _KEY_VALUE = _HEADS * _HEAD_DIM, _KV_HEADS * _HEAD_DIM

_COMMON: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": _HIDDEN,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD_DIM,
    "intermediate_size": _WIDTH,
    "vocab_size": _VOCAB,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
_MOE: dict[str, Any] = {
    "moe_intermediate_size": _EXPERT_WIDTH,
    "n_routed_experts": _EXPERTS,
    "num_experts": _EXPERTS,
    "num_local_experts": _EXPERTS,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}


@dataclass(frozen=True)
class Naming:
    """An architecture's tensor names; ``{}`` stands for the layer. Attention's names come with their rows."""

    embeddings: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    head_norms: tuple[str, ...] = ()
    attention: tuple[tuple[str, int], ...] = (
        ("self_attn.q_proj", _QUERY),
        ("self_attn.k_proj", _KEY_VALUE),
        ("self_attn.v_proj", _KEY_VALUE),
    )
    output: str = "self_attn.o_proj"
    mlp: tuple[str, str, str] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    biases: bool = False


@dataclass(frozen=True)
class RemoteFamily:
    """An architecture: its names, its config's keys beyond the common ones, and where it has experts."""

    naming: Naming = field(default_factory=Naming)
    config: dict[str, Any] = field(default_factory=dict)
    dense_layers: int = _LAYERS
    shared: str | None = None


_BAILING = Naming(
    embeddings="model.word_embeddings",
    attention=(("attention.query_key_value", _QUERY + 2 * _KEY_VALUE),),
    output="attention.dense",
)

FAMILIES: dict[str, RemoteFamily] = {
    "BaichuanForCausalLM": RemoteFamily(Naming(attention=(("self_attn.W_pack", 3 * _QUERY),))),
    "BailingMoeForCausalLM": RemoteFamily(
        _BAILING,
        {**_MOE, "use_qkv_bias": False, "use_bias": False, "embedding_dropout": 0.0, "norm_head": False},
        dense_layers=1,
        shared="mlp.shared_experts",
    ),
    "DeepseekForCausalLM": RemoteFamily(config=_MOE, dense_layers=1, shared="mlp.shared_experts"),
    "InternLM2ForCausalLM": RemoteFamily(
        Naming(
            embeddings="model.tok_embeddings",
            head="output",
            norms=("attention_norm", "ffn_norm"),
            attention=(("attention.wqkv", _QUERY + 2 * _KEY_VALUE),),
            output="attention.wo",
            mlp=("feed_forward.w1", "feed_forward.w3", "feed_forward.w2"),
        )
    ),
    "MiMoForCausalLM": RemoteFamily(Naming(biases=True), {"num_nextn_predict_layers": 0}),
    "MiniCPMForCausalLM": RemoteFamily(config={"scale_emb": 12, "dim_model_base": 128, "scale_depth": 1.4}),
    "SDARForCausalLM": RemoteFamily(Naming(head_norms=("self_attn.q_norm", "self_attn.k_norm"))),
    "SDARMoeForCausalLM": RemoteFamily(
        Naming(head_norms=("self_attn.q_norm", "self_attn.k_norm")), {**_MOE, "mlp_only_layers": []}, dense_layers=0
    ),
    "SolarForCausalLM": RemoteFamily(config={"bskcn_1": [], "bskcn_2": [], "bskcn_3": [], "bskcn_4": []}),
    "XverseForCausalLM": RemoteFamily(),
    "XverseMoeForCausalLM": RemoteFamily(
        config={**_MOE, "moe_top_k": 2, "intermediate_size": _EXPERT_WIDTH}, dense_layers=0, shared="mlp.shared_experts"
    ),
}


def architectures() -> list[str]:
    """The architectures of this module."""
    return sorted(FAMILIES)


def build(architecture: str, folder: Path) -> Path:
    """Write a checkpoint of `architecture` into a folder of its name under `folder`, unless it exists."""
    from safetensors.torch import save_file

    path = folder / architecture
    if path.exists():
        return path
    family = FAMILIES[architecture]
    tensors = {plan.name: make_tensor(plan, seed=0) for plan in _plans(family)}
    draft = folder / f".{architecture}"
    draft.mkdir(parents=True, exist_ok=True)
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    config = {**_COMMON, **family.config, "architectures": [architecture]}
    (draft / "config.json").write_text(json.dumps(config, indent=2))
    draft.rename(path)
    return path


def _plans(family: RemoteFamily) -> Iterator[TensorPlan]:
    naming = family.naming
    yield TensorPlan(f"{naming.embeddings}.weight", (_VOCAB, _HIDDEN), "matrix")
    for layer in range(_LAYERS):
        yield from _layer(family, naming.layer.format(layer), is_dense=layer < family.dense_layers)
    yield TensorPlan(f"{naming.norm}.weight", (_HIDDEN,), "norm")
    yield TensorPlan(f"{naming.head}.weight", (_VOCAB, _HIDDEN), "matrix")


def _layer(family: RemoteFamily, prefix: str, *, is_dense: bool) -> Iterator[TensorPlan]:
    naming = family.naming
    for norm in naming.norms:
        yield TensorPlan(f"{prefix}.{norm}.weight", (_HIDDEN,), "norm")
    for norm in naming.head_norms:
        yield TensorPlan(f"{prefix}.{norm}.weight", (_HEAD_DIM,), "norm")
    for name, rows in naming.attention:
        yield TensorPlan(f"{prefix}.{name}.weight", (rows, _HIDDEN))
        if naming.biases:
            yield TensorPlan(f"{prefix}.{name}.bias", (rows,), "bias")
    yield TensorPlan(f"{prefix}.{naming.output}.weight", (_HIDDEN, _QUERY))
    yield from _dense(prefix, naming.mlp) if is_dense else _experts(prefix, family)


def _dense(prefix: str, names: tuple[str, str, str], width: int = _WIDTH) -> Iterator[TensorPlan]:
    gate, up, down = names
    yield TensorPlan(f"{prefix}.{gate}.weight", (width, _HIDDEN))
    yield TensorPlan(f"{prefix}.{up}.weight", (width, _HIDDEN))
    yield TensorPlan(f"{prefix}.{down}.weight", (_HIDDEN, width))


def _experts(prefix: str, family: RemoteFamily) -> Iterator[TensorPlan]:
    router = "mlp.router" if "moe_top_k" in family.config else "mlp.gate"
    yield TensorPlan(f"{prefix}.{router}.weight", (_EXPERTS, _HIDDEN), "matrix")
    for expert in range(_EXPERTS):
        yield from _gated(f"{prefix}.mlp.experts.{expert}")
    if family.shared is not None:
        yield from _gated(f"{prefix}.{family.shared}")


def _gated(prefix: str) -> Iterator[TensorPlan]:
    return _dense(prefix, ("gate_proj", "up_proj", "down_proj"), _EXPERT_WIDTH)
