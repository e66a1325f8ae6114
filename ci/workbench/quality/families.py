"""Tiny checkpoints of every architecture that both SGLang's registry and ``transformers`` know.

The config class's own defaults are shrunk key by key (:data:`TINY`), whatever the model calls them, in the config and
in all nested configs; :data:`SPECIAL` has what an architecture needs beyond that. The weights are the ``transformers``
model's own parameters under the names it saves them by, which are those of published checkpoints.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

Config = dict[str, Any]

_VOCAB = 512
_LAYERS = 2

#: Key of a config -> its tiny value. Keys are only replaced if the config class has them with a number.
TINY: Config = {
    **dict.fromkeys(("vocab_size", "padded_vocab_size", "vocab_size_per_layer_input"), _VOCAB),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers"), _LAYERS
    ),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "out_hidden_size", "embed_dim", "projection_dim"), 128),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "encoder_ffn_dim", "decoder_ffn_dim"), 256),
    **dict.fromkeys(("shared_intermediate_size", "intermediate_size_mlp", "shared_expert_intermediate_size"), 192),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size"), 96),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    "decoder_attention_heads": 4,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "kv_channels", "global_head_dim", "swa_head_dim"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim"), 64),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 32),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "image_token_id", "video_token_id"), 2),
    **dict.fromkeys(("vision_start_token_id", "vision_end_token_id", "audio_token_id", "image_token_index"), 3),
    "qk_rope_head_dim": 16,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 512,
    "hidden_size_per_layer_input": 32,
    "num_kv_shared_layers": 0,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 32,
    "mamba_head_dim": 32,
    "mamba_d_state": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "mamba_n_groups": 1,
    "num_nextn_predict_layers": 0,
    "image_size": 56,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "num_position_embeddings": 64,
    "dropout": 0.0,
}

_YARN: Config = {
    "type": "yarn",
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
}
_DEEPSEEK: Config = {"moe_layer_freq": 1, "topk_method": "greedy", "scoring_func": "softmax", "rope_scaling": _YARN}
_DEEPSEEK_V3: Config = {**_DEEPSEEK, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}

_VISION: Config = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "patch_size": 14,
}

_HYBRID: Config = {
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "layer_types": [*["linear_attention"] * 3, "full_attention"],
}

#: Architecture -> dotted config key -> value: exceptions to the table above, and keys that published configs have but
#: ``transformers`` does not write.
SPECIAL: dict[str, Config] = {
    "BertForSequenceClassification": {"position_embedding_type": "absolute"},
    "BertModel": {"position_embedding_type": "absolute"},
    "Cosmos3EdgeForConditionalGeneration": {"text_config.rope_parameters.mrope_section": [8, 4, 4]},
    "DeepseekV2ForCausalLM": {
        **_DEEPSEEK,
        "rope_parameters": _YARN,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "DeepseekV3ForCausalLM": {**_DEEPSEEK_V3, "rope_parameters": _YARN},
    "DeepseekV32ForCausalLM": {**_DEEPSEEK_V3, "rope_parameters": _YARN, "index_n_heads": 4},
    "DiffusionGemmaForBlockDiffusion": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 96,
        "text_config.per_layer_config": None,
        "vision_config": {"model_type": "gemma4_vision", "hidden_size": 128, "num_hidden_layers": 2},
    },
    "EmbeddingGemma2Model": {
        "text_config.per_layer_config": {1: {"head_dim": 64, "num_key_value_heads": 1}},
        "vision_config": {
            "model_type": "gemma4_vision",
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "position_embedding_size": 64,
        },
    },
    "Exaone4ForCausalLM": {"layer_types": ["sliding_attention", "full_attention"]},
    "ExaoneMoeForCausalLM": {"layer_types": ["sliding_attention", "full_attention"]},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 256},
    "Gemma2ForCausalLM": {"hidden_act": "gelu_pytorch_tanh"},
    "Gemma2ForSequenceClassification": {"hidden_act": "gelu_pytorch_tanh"},
    "Gemma3nForCausalLM": {
        "intermediate_size": [256, 256],
        "activation_sparsity_pattern": [0.95, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "Gemma4ForCausalLM": {"per_layer_config": None},
    "Gemma3nForConditionalGeneration": {
        "text_config.intermediate_size": 256,
        "text_config.activation_sparsity_pattern": [0.95, 0.0],
        "text_config.layer_types": ["sliding_attention", "full_attention"],
        "vision_config.model_args": {"channel_multiplier": 0.125},
        "audio_config.conf_num_hidden_layers": 2,
        "audio_config.conf_num_attention_heads": 4,
    },
    "Gemma4ForConditionalGeneration": {
        "text_config.per_layer_config": None,
        "text_config.enable_moe_block": True,
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 96,
        # Not audio: stock cannot build its layers with ``--quantization fp8``.
        "vision_config": {**_VISION, "model_type": "gemma4_vision", "position_embedding_size": 64},
    },
    "Gemma4UnifiedForConditionalGeneration": {
        "text_config.per_layer_config": None,
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": 4,
            "mm_embed_dim": 96,
            "mm_posemb_size": 64,
            "output_proj_dims": 96,
        },
    },
    "Glm4MoeLiteForCausalLM": {"first_k_dense_replace": 1, "moe_layer_freq": 1},
    "Glm5NextForConditionalGeneration": {
        "text_config.num_key_value_heads": 4,
        "text_config.qk_rope_head_dim": 0,
        "text_config.layer_types": ["linear_attention", "indexed_attention"],
        "text_config.mlp_layer_types": ["dense", "sparse"],
    },
    "GlmMoeDsaForCausalLM": {
        "index_n_heads": 4,
        "indexer_types": ["full", "full"],
        "moe_layer_freq": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    },
    "HunYuanDenseV1ForCausalLM": {"head_dim": 32, "use_qk_norm": True},
    "HunYuanMoEV1ForCausalLM": {
        "head_dim": 32,
        "use_qk_norm": True,
        "moe_intermediate_size": 256,
        "use_mixed_mlp_moe": True,
        "num_shared_expert": 1,
    },
    "HYV3ForCausalLM": {"route_norm": True, "first_k_dense_replace": 1, "expert_hidden_dim": 96},
    "LagunaForCausalLM": {"num_attention_heads_per_layer": [4, 4]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 32, "state_size": 16},
    "MiMoV2FlashForCausalLM": {"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1]},
    "MiniCPMV4_6ForConditionalGeneration": {f"text_config.{key}": value for key, value in _HYBRID.items()},
    "MiniCPMV4_7ForConditionalGeneration": {f"text_config.{key}": value for key, value in _HYBRID.items()},
    "MiniMaxM2ForCausalLM": {"scoring_func": "sigmoid", "use_routing_bias": True},
    "NemotronHForCausalLM": {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
    },
    "OlmoForCausalLM": {"num_key_value_heads": 4},
    "OlmoeForCausalLM": {"num_key_value_heads": 4},
    "PhiForCausalLM": {"num_key_value_heads": 4, "intermediate_size": 512},
    "Qwen2VLForConditionalGeneration": {"vision_config.in_chans": 3},
    "Qwen3NextForCausalLM": _HYBRID,
    "Qwen3_5ForCausalLM": _HYBRID,
    "Qwen3_5MoeForCausalLM": _HYBRID,
    "Qwen3_5ForConditionalGeneration": {f"text_config.{key}": value for key, value in _HYBRID.items()},
    "Qwen3_5MoeForConditionalGeneration": {f"text_config.{key}": value for key, value in _HYBRID.items()},
    "XLMRobertaForSequenceClassification": {"position_embedding_type": "absolute"},
    "XLMRobertaModel": {"position_embedding_type": "absolute"},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}

#: The same for keys of published configs that ``transformers`` ignores or reads differently.
PUBLISHED: dict[str, Config] = {
    "Exaone4ForCausalLM": {"sliding_window_pattern": "LG"},
    "ExaoneMoeForCausalLM": {"sliding_window_pattern": "LG", "is_moe_layer": [False, True]},
    "Gemma4UnifiedForConditionalGeneration": {
        "text_config.hidden_size_per_layer_input": 0,
        "vision_config.model_patch_size": 12,
    },
    "Glm5NextForConditionalGeneration": {
        "text_config.first_k_dense_replace": 1,
        "text_config.index_kpool_compress": True,
        "text_config.mhc": True,
    },
    "GptOssForCausalLM": {"swiglu_limit": 7.0},
    "Mamba2ForCausalLM": {"intermediate_size": 256, "rms_norm": True},
    "LongcatFlashForCausalLM": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "NemotronHForCausalLM": {
        "hybrid_override_pattern": "ME*-",
        "ssm_state_size": 16,
        "mamba_n_groups": 1,
        "n_groups": 1,
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
    },
    # SGLang asks every config for it.
    "PixtralVisionModel": {"vocab_size": _VOCAB},
    "Qwen3_5MoeForConditionalGeneration": {"vision_config.deepstack_visual_indexes": []},
}

#: Architecture -> server options that it needs to load.
SERVER_ARGS: dict[str, dict[str, Any]] = {
    "Exaone4ForCausalLM": {"attention_backend": "triton"},
    "ExaoneMoeForCausalLM": {"attention_backend": "triton"},
}

#: Architecture -> the stand-in GPU on which it is loaded, where SGLang's model needs CUDA.
GPUS: dict[str, str] = dict.fromkeys(
    (
        "DeepseekV32ForCausalLM",
        "FalconMambaForCausalLM",
        "Gemma3nForCausalLM",
        "Gemma3nForConditionalGeneration",
        "Glm5NextForConditionalGeneration",
        "GlmMoeDsaForCausalLM",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",
        "Qwen3NextForCausalLM",
    ),
    "h200",
)

_TABLES: dict[str, dict[str, Any]] = {
    "special": SPECIAL,
    "published": PUBLISHED,
    "server_args": SERVER_ARGS,
    "gpu": GPUS,
}

#: Lists with an entry per layer: left out, so that the config class creates them for the tiny number of layers.
_PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "mlp_only_layers",
    "attn_type_list",
    "layers_block_type",
)


def tiny_config(architecture: str) -> Any:
    """The architecture's config class at tiny sizes."""
    import transformers

    config_class = getattr(transformers, architecture).config_class
    plain = _shrunk(config_class().to_dict())
    for key, value in SPECIAL.get(architecture, {}).items():
        put(plain, key.split("."), value)
    plain["architectures"] = [architecture]
    plain["dtype"] = "bfloat16"
    return config_class.from_dict(plain)


def _shrunk(config: Config) -> Config:
    small = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in ("rope_parameters", "rope_scaling"):
            small[key] = _shrunk(value)
        elif key in TINY and isinstance(value, (int, float)) and not isinstance(value, bool):
            small[key] = TINY[key]
        elif key not in _PER_LAYER:
            small[key] = value
    return small


def put(config: Config, path: list[str], value: Any) -> None:
    """Set the value at a path of keys in nested dicts."""
    for key in path[:-1]:
        config = config.setdefault(key, {})
    config[path[-1]] = value


def data(architecture: str) -> Config:
    """What this module knows of the architecture, and what the tables make of its config class."""
    own = {key: table.get(architecture) for key, table in _TABLES.items()}
    try:
        return {**own, "config": tiny_config(architecture).to_json_string(use_diff=False)}
    except Exception as error:
        return {**own, "error": type(error).__name__}


def server_args(architecture: str) -> dict[str, Any]:
    """Server options for loading the architecture."""
    return SERVER_ARGS.get(architecture, {})


def build(architecture: str, folder: Path) -> Path:
    """Write a checkpoint of `architecture` into a folder of its name under `folder`, unless it exists.

    Raises:
        LookupError: ``transformers`` does not have it.
        Exception: any error of ``transformers`` if it cannot build the model.
    """
    import transformers

    if not hasattr(transformers, architecture):
        raise LookupError("transformers does not have it, and nothing says what its published checkpoint looks like")
    path = folder / architecture
    if (path / "config.json").exists():
        return path
    draft = folder / f".{architecture}"
    torch.manual_seed(0)
    config = tiny_config(architecture)
    model = getattr(transformers, architecture)(config).to(torch.bfloat16)
    fill(dict(model.named_parameters()))
    model.save_pretrained(draft, max_shard_size="1GB")
    written = json.loads((draft / "config.json").read_text())
    for key, value in {**SPECIAL.get(architecture, {}), **PUBLISHED.get(architecture, {})}.items():
        put(written, key.split("."), value)
    (draft / "config.json").write_text(json.dumps({**written, "architectures": [architecture]}, indent=2))
    draft.rename(path)
    return path


@torch.no_grad()
def fill(parameters: dict[str, torch.Tensor]) -> None:
    """Fill with random values whose scale differs from row to row, so that a slice in the wrong place shows."""
    generator = torch.Generator().manual_seed(0)
    for tensor in parameters.values():
        rows = torch.exp2(2 * torch.rand(tensor.shape[:1], generator=generator) - 1).view(-1, *[1] * (tensor.dim() - 1))
        values = (
            torch.randn(tensor.shape, generator=generator) * rows
            if tensor.dim()
            else torch.randn((), generator=generator)
        )
        tensor.copy_(values / math.sqrt(max(1, tensor.shape[-1] if tensor.dim() else 1)))
