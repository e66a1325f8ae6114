"""Drafts of speculative decoding: MTP layers, EAGLE heads, DFlash and DSpark."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from workbench.quality.families import SPECIAL, Config
from workbench.quality.published import Published, Tensors, of_transformers
from workbench.quality.sizes import DENSE, EXPERTS, INKLING, LLAMA, MIMO_V2, MLA

_MLA: Config = {
    **MLA,
    "rope_scaling": SPECIAL["DeepseekV3ForCausalLM"]["rope_scaling"],
}


def _mtp_layer(layer: str) -> tuple[tuple[str, str], ...]:
    """Names of an MTP layer as DeepSeek-V3 publishes it: a further decoder layer, with the MTP's own norms in it."""
    return (
        (r"^model\.decoder\.", f"{layer}."),
        (r"^model\.(?=enorm|hnorm|eh_proj|embed_tokens|shared_head)", f"{layer}."),
        (r"^lm_head\.", f"{layer}.shared_head.head."),
    )


_TARGETS = r"^(model\.embed_tokens|lm_head)\."
"""What a draft shares with its target, so that its checkpoint need not have it."""


def _draft_vocabulary(tensors: Tensors) -> Tensors:
    """With the tables between the draft's vocabulary and its target's."""
    return {**tensors, "d2t": ((256,), torch.int64), "t2d": ((512,), torch.bool)}


def _gemma(target: str, **own: Any) -> Callable[[], Config]:
    """The config of an assistant: layers as its target's, which have no keys and values of their own."""

    def config() -> Config:
        made = of_transformers(target)()
        text = {
            **made.get("text_config", made),
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "use_double_wide_mlp": False,
            "enable_moe_block": False,
            "num_kv_shared_layers": 2,
        }
        return {**own, "text_config": text, "backbone_hidden_size": 192, "num_centroids": 16}

    return config


def _layer_scalars(tensors: Tensors) -> Tensors:
    """With what SGLang keeps as buffers."""
    return {**tensors, **{f"model.layers.{layer}.layer_scalar": ((1,), torch.bfloat16) for layer in range(2)}}


def _token_ordering(tensors: Tensors) -> Tensors:
    return {**_layer_scalars(tensors), "masked_embedding.token_ordering": ((512,), torch.int64)}


_GEMMA = (
    (r".*\.self_attn\.[kv]_(?:proj|norm)\..*", ""),
    (r"^centroids\.", "masked_embedding.centroids."),
)
_EAGLE = ((r"^lm_head\..*", ""), (r"^model\.", ""))
_MISTRAL_NAMES = (
    (r"^lm_head\..*|^model\.embed_tokens\..*", ""),
    (r"^model\.fc\.", "eagle_linear."),
    (r"^model\.", ""),
    (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.(q|k|v|o)_proj\.", r".attention.w\1."),
    (r"\.self_attn\.(q_a|q_b|kv_a|kv_b)_proj(_with_mqa)?\.", r".attention.w\1\2."),
    (r"\.self_attn\.(q_a|kv_a)_layernorm\.", r".attention.\1_norm."),
    (r"\.mlp\.gate\.weight", ".gate.weight"),
    (r"\.mlp\.gate\.e_score_correction_bias", ".router_biases"),
    (r"\.mlp\.((?:shared_)?experts)\.", r".\1."),
    (r"\.mlp\.", ".feed_forward."),
    (r"\.gate_proj\.", ".w1."),
    (r"\.down_proj\.", ".w2."),
    (r"\.up_proj\.", ".w3."),
)

_QWEN_MTP = (
    (r"^lm_head\..*|^model\.embed_tokens\..*", ""),
    (r"^(fc|pre_fc_norm_\w+)\.", r"mtp.\1."),
    (r"^model\.", "mtp."),
    (r"(?<!self_attn)\.([qkvo]_proj|[qk]_norm)\.", r".self_attn.\1."),
)
"""Of Qwen and of those that publish an MTP layer as it does."""

_DFLASH: Config = {
    **DENSE,
    "model_type": "qwen3",
    "attention_bias": False,
    "layer_types": ["full_attention"] * 2,
    "block_size": 8,
    "num_target_layers": 6,
    "dflash_config": {"mask_token_id": 5, "target_layer_ids": [1, 2, 4]},
}
_DFLASH_2: Config = {
    **_DFLASH,
    "dflash_config": {
        **_DFLASH["dflash_config"],
        "conv_kernel_size": 4,
        "conv_group_size": 32,
        "selector_rank": 16,
        "selector_top_k": 4,
    },
}
_DSPARK: Config = {**_DFLASH, "markov_rank": 16, "markov_head_type": "vanilla", "enable_confidence_head": True}
_DEEPSEEK_V4_MTP = (
    (r"^lm_head\..*|^model\.embed_tokens\..*", ""),
    (r"^model\.shared_head\.norm\.", "mtp.0.norm."),
    (r"^model\.decoder\.|^model\.", "mtp.0."),
    (r"^stages\.", "mtp."),
    (r"^(markov|confidence)_head\.", r"mtp.1.\1_head."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.gate_proj\.", ".w1."),
    (r"\.down_proj\.", ".w2."),
    (r"\.up_proj\.", ".w3."),
    (r"\.topk\.tid2eid", ".gate.tid2eid"),
    (r"\.gate\.e_score_correction_bias", ".gate.bias"),
)
_DENSE_EXPERTS = {"SGLANG_DSV4_FP4_EXPERTS": "0"}
"""Without it SGLang takes the experts of a bf16 checkpoint for the published fp4 ones."""
_DEEPSEEK_V4: Config = {
    **DENSE,
    **EXPERTS,
    **_MLA,
    "model_type": "deepseek_v4",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 0,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_nope_head_dim": 48,
    "topk_method": "noaux_tc",
    "scoring_func": "sqrtsoftplus",
    "n_group": 1,
    "topk_group": 1,
    "swiglu_limit": 10.0,
    "compress_ratios": [0, 4, 128],
    "compress_rope_theta": 160000.0,
    "sliding_window": 128,
    "o_groups": 2,
    "o_lora_rank": 64,
    "index_n_heads": 4,
    "index_head_dim": 64,
    "index_topk": 64,
    "hc_mult": 2,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
}

_MISTRAL: Config = {
    "model_type": "transformer",
    "dim": 128,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 32,
    "hidden_dim": 256,
    "norm_eps": 1e-6,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
"""A config in the keys of Mistral's own format."""

ARCHITECTURES: dict[str, Published] = {
    "DeepseekV3ForCausalLMNextN": Published(
        "https://huggingface.co/deepseek-ai/DeepSeek-V3, sglang/srt/models/deepseek_nextn.py",
        of_transformers("DeepseekV3ForCausalLM", num_nextn_predict_layers=1),
        named_in_config="DeepseekV3ForCausalLM",
        names=_mtp_layer("model.layers.2"),
        lacks=_TARGETS,
        beside="DeepseekV3ForCausalLM",
        is_draft=True,
    ),
    "LlamaForCausalLMEagle": Published(
        "https://huggingface.co/lmsys/sglang-EAGLE-llama2-chat-7B, sglang/srt/models/llama_eagle.py",
        LLAMA,
        names=_EAGLE,
        lacks=_TARGETS,
        is_draft=True,
    ),
    "Qwen2ForCausalLMEagle": Published(
        "https://huggingface.co/yuhuili/EAGLE-Qwen2-7B-Instruct, sglang/srt/models/qwen2_eagle.py",
        {**DENSE, "model_type": "qwen2"},
        names=_EAGLE,
        lacks=_TARGETS,
        is_draft=True,
    ),
    "LlamaForCausalLMEagle3": Published(
        "https://huggingface.co/yuhuili/EAGLE3-LLaMA3.1-Instruct-8B, sglang/srt/models/llama_eagle3.py",
        {**LLAMA, "num_hidden_layers": 1, "draft_vocab_size": 256},
        names=((r"^model\.embed_tokens\..*", ""), (r"^model\.layers\.0\.", "midlayer."), (r"^model\.", "")),
        adjust=_draft_vocabulary,
        lacks=_TARGETS,
        is_draft=True,
    ),
    "Eagle3DeepseekV2ForCausalLM": Published(
        "sglang/srt/models/kimi_k25_eagle3.py",
        {**DENSE, **_MLA, "model_type": "kimi_k2", "num_hidden_layers": 1, "draft_vocab_size": 256},
        names=((r"^model\.midlayer\.", "layers.0."), (r"^model\.", "")),
        adjust=_draft_vocabulary,
        is_draft=True,
    ),
    "MistralForCausalLMEagle": Published(
        "sglang/srt/models/mistral_eagle.py",
        _MISTRAL,
        names=_MISTRAL_NAMES,
        lacks=_TARGETS,
        config_file="params.json",
        is_draft=True,
    ),
    "MistralLarge3ForCausalLMEagle": Published(
        "https://huggingface.co/mistralai/Mistral-Large-3-675B-Instruct-2512-Eagle, mistral_large_3_eagle.py",
        {
            **_MISTRAL,
            **{key: value for key, value in _MLA.items() if key != "rope_scaling"},
            "n_kv_heads": 4,
            "moe": {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "num_shared_experts": 1,
                "expert_hidden_dim": 96,
                "first_k_dense_replace": 1,
                "route_every_n": 1,
                "routed_scale": 1.0,
                "num_expert_groups": 1,
                "num_expert_groups_per_tok": 1,
            },
            "llama_4_scaling": {"original_max_position_embeddings": 64, "beta": 0.1},
            "yarn": {"factor": 8, "original_max_position_embeddings": 64, "beta": 32, "alpha": 1},
        },
        names=_MISTRAL_NAMES,
        lacks=_TARGETS,
        config_file="params.json",
        is_draft=True,
    ),
    "Glm4MoeForCausalLMNextN": Published(
        "https://huggingface.co/zai-org/GLM-4.5-Air, sglang/srt/models/glm4_moe_nextn.py",
        of_transformers("Glm4MoeForCausalLM", num_nextn_predict_layers=1),
        named_in_config="Glm4MoeForCausalLM",
        names=_mtp_layer("model.layers.2"),
        lacks=_TARGETS,
        beside="Glm4MoeForCausalLM",
        is_draft=True,
    ),
    "Glm4MoeLiteForCausalLMNextN": Published(
        "https://huggingface.co/zai-org/GLM-4.7-Flash, sglang/srt/models/glm4_moe_lite_nextn.py",
        of_transformers("Glm4MoeLiteForCausalLM", num_nextn_predict_layers=1),
        named_in_config="Glm4MoeLiteForCausalLM",
        names=_mtp_layer("model.layers.2"),
        lacks=_TARGETS,
        beside="Glm4MoeLiteForCausalLM",
        is_draft=True,
    ),
    "GlmMoeDsaForCausalLMNextN": Published(
        "https://huggingface.co/zai-org/GLM-5, sglang/srt/models/glm4_moe.py",
        of_transformers("GlmMoeDsaForCausalLM", num_nextn_predict_layers=1),
        named_in_config="GlmMoeDsaForCausalLM",
        names=_mtp_layer("model.layers.2"),
        lacks=_TARGETS,
        beside="GlmMoeDsaForCausalLM",
        is_draft=True,
        gpu="h200",
    ),
    "Glm5NextForConditionalGenerationNextN": Published(
        "sglang/srt/models/glm5_next_nextn.py",
        of_transformers(
            "Glm5NextForConditionalGeneration",
            **{
                "text_config.num_nextn_predict_layers": 1,
                # SGLang's class copies it over that of the whole.
                "text_config.architectures": ["Glm5NextForConditionalGeneration"],
            },
        ),
        named_in_config="Glm5NextForConditionalGeneration",
        names=_mtp_layer("model.language_model.layers.2"),
        splits={"fused_qkv_a_proj_with_mqa": (("q_a_proj", 64), ("kv_a_proj_with_mqa", 64))},
        lacks=_TARGETS,
        beside="Glm5NextForConditionalGeneration",
        is_draft=True,
        gpu="h200",
    ),
    "GlmOcrForConditionalGenerationNextN": Published(
        "https://huggingface.co/zai-org/GLM-OCR, sglang/srt/models/glm_ocr_nextn.py",
        of_transformers("GlmOcrForConditionalGeneration", **{"text_config.num_nextn_predict_layers": 1}),
        named_in_config="GlmOcrForConditionalGeneration",
        names=_mtp_layer("model.language_model.layers.2"),
        lacks=_TARGETS,
        beside="GlmOcrForConditionalGeneration",
        is_draft=True,
    ),
    "Qwen3NextForCausalLMMTP": Published(
        "https://huggingface.co/Qwen/Qwen3-Next-80B-A3B-Instruct, sglang/srt/models/qwen3_next_mtp.py",
        of_transformers("Qwen3NextForCausalLM"),
        named_in_config="Qwen3NextForCausalLM",
        names=_QWEN_MTP,
        lacks=_TARGETS,
        beside="Qwen3NextForCausalLM",
        is_draft=True,
        gpu="h200",
    ),
    "Qwen3_5ForCausalLMMTP": Published(
        "https://huggingface.co/Qwen/Qwen3.6-35B-A3B, sglang/srt/models/qwen3_5_mtp.py",
        of_transformers("Qwen3_5MoeForConditionalGeneration", **{"text_config.mtp_num_hidden_layers": 1}),
        named_in_config="Qwen3_5MoeForConditionalGeneration",
        names=(*_QWEN_MTP, (r"\.experts\.w13_weight", ".experts.gate_up_proj"), (r"\.w2_weight", ".down_proj")),
        experts=(),
        lacks=_TARGETS,
        beside="Qwen3_5MoeForConditionalGeneration",
        is_draft=True,
    ),
    "Qwen3MoeForCausalLMMTP": Published(
        "sglang/srt/models/qwen3_moe_mtp.py",
        of_transformers("Qwen3MoeForCausalLM"),
        named_in_config="Qwen3MoeForCausalLM",
        names=_QWEN_MTP,
        lacks=_TARGETS,
        beside="Qwen3MoeForCausalLM",
        is_draft=True,
    ),
    "ExaoneMoEForCausalLMMTP": Published(
        "https://huggingface.co/LGAI-EXAONE/K-EXAONE-236B-A23B, sglang/srt/models/exaone_moe_mtp.py",
        of_transformers("ExaoneMoeForCausalLM"),
        named_in_config="ExaoneMoeForCausalLM",
        names=_QWEN_MTP,
        lacks=_TARGETS,
        beside="ExaoneMoeForCausalLM",
        is_draft=True,
        server_args={"attention_backend": "triton"},
    ),
    "MiMoMTP": Published(
        "https://huggingface.co/XiaomiMiMo/MiMo-7B-RL, sglang/srt/models/mimo_mtp.py",
        {**DENSE, "model_type": "qwen2", "num_nextn_predict_layers": 1},
        named_in_config="MiMoForCausalLM",
        names=((r"^model\.(?:mtp_block\.)?(?!embed_tokens)", "model.mtp_layers.0."),),
        beside="MiMoForCausalLM",
        is_draft=True,
    ),
    "MiMoV2MTP": Published(
        "https://huggingface.co/XiaomiMiMo/MiMo-V2-Flash, sglang/srt/models/mimo_v2_nextn.py",
        {
            **DENSE,
            **EXPERTS,
            **MIMO_V2,
            "attention_bias": False,
            "partial_rotary_factor": 0.5,
            "layernorm_epsilon": 1e-5,
        },
        named_in_config="MiMoV2FlashForCausalLM",
        names=(
            (r"^model\.(?:mtp_block\.)?(?!embed_tokens)", "model.mtp.layers.0."),
            (r"\.post_attention_layernorm\.", ".pre_mlp_layernorm."),
        ),
        beside="MiMoV2FlashForCausalLM",
        is_draft=True,
    ),
    "LongcatFlashForCausalLMNextN": Published(
        "https://huggingface.co/meituan-longcat/LongCat-Flash-Chat, sglang/srt/models/longcat_flash_nextn.py",
        {
            **DENSE,
            **_MLA,
            "model_type": "longcat_flash",
            "ffn_hidden_size": 256,
            "expert_ffn_hidden_size": 96,
            "num_layers": 2,
            "n_routed_experts": 4,
            "moe_topk": 2,
            "zero_expert_num": 2,
            "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0},
        },
        named_in_config="LongcatFlashForCausalLM",
        names=(
            (r"^lm_head\..*", ""),
            (r"^model\.decoder\.mlp\.", "model.mtp.layers.0.transformer_layer.mlp."),
            (r"^model\.decoder\.", "model.mtp.layers.0."),
            (r"^model\.(enorm|hnorm)\.", r"model.mtp.layers.0.\1.m."),
            (r"^model\.eh_proj\.", "model.mtp.layers.0.eh_proj."),
            (r"^model\.final_layernorm\.", "model.mtp.norm."),
            (r"^model\.embed_tokens\.", "model.mtp.embed_tokens."),
        ),
        lacks=_TARGETS,
        beside="LongcatFlashForCausalLM",
        is_draft=True,
    ),
    "DeepseekV4ForCausalLMNextN": Published(
        "https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash, sglang/srt/models/deepseek_v4.py",
        _DEEPSEEK_V4,
        named_in_config="DeepseekV4ForCausalLM",
        names=_DEEPSEEK_V4_MTP,
        splits={"wqkv_a": (("wq_a", 64), ("wkv", 64))},
        lacks=_TARGETS,
        beside="DeepseekV4ForCausalLM",
        is_draft=True,
        environ=_DENSE_EXPERTS,
        gpu="h200",
    ),
    "DeepseekV4ForCausalLMDSpark": Published(
        "https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash-DSpark, sglang/srt/models/deepseek_v4_dspark.py",
        {
            **_DEEPSEEK_V4,
            "dspark_block_size": 4,
            "dspark_markov_rank": 16,
            "dspark_noise_token_id": 5,
            "dspark_target_layer_ids": [0, 1],
        },
        named_in_config="DeepseekV4ForCausalLM",
        names=_DEEPSEEK_V4_MTP,
        beside="DeepseekV4ForCausalLM",
        is_draft=True,
        environ=_DENSE_EXPERTS,
        gpu="h200",
    ),
    "DFlashDraftModel": Published(
        "https://huggingface.co/z-lab/Qwen3-8B-DFlash-b16, sglang/srt/models/dflash.py", _DFLASH, is_draft=True
    ),
    "DFlashLagunaForCausalLM": Published(
        "sglang/srt/models/dflash.py", {**_DFLASH, "model_type": "laguna", "gating": "per-head"}, is_draft=True
    ),
    **{
        architecture: Published("sglang/srt/models/dflash.py", _DFLASH_2, is_draft=True)
        for architecture in ("DFlash2DraftModel", "DFlash2BeamDraftModel", "MiniMaxDFlash2DraftModel")
    },
    **{
        architecture: Published(
            "https://huggingface.co/RadixArk/Qwen3.8-27B-DSpark, sglang/srt/models/dspark.py", _DSPARK, is_draft=True
        )
        for architecture in ("DSparkDraftModel", "Qwen3DSparkModel", "LingDSparkModel", "Lfm2DSparkDraftModel")
    },
    "LiLiCorrDraftModel": Published(
        "sglang/srt/models/lilicorr.py",
        {
            **_DFLASH,
            "dflash_config": {
                **_DFLASH["dflash_config"],
                "lilicorr_candidate_topk": 4,
                "lilicorr_hidden_size": 64,
                "lilicorr_num_layers": 1,
                "lilicorr_num_heads": 2,
                "lilicorr_mlp_ratio": 2.0,
                "lilicorr_factor_dim": 16,
                "lilicorr_vector_eps": 1e-6,
                "lilicorr_logit_scale": 1.0,
            },
        },
        is_draft=True,
    ),
    "DSparkMiniMaxDraftModel": Published(
        "sglang/srt/models/dspark_minimax.py, sglang/srt/configs/minimax_vl.py",
        {
            "model_type": "minimax_m3_vl",
            "text_config": {
                **DENSE,
                "model_type": "minimax_m3",
                "use_qk_norm": True,
                "qk_norm_type": "per_head",
                "use_gemma_norm": True,
                "rotary_dim": 16,
                "dflash_config": {
                    "num_hidden_layers": 2,
                    "num_target_layers": 6,
                    "target_layer_ids": [1, 2, 4],
                },
            },
            "dspark_use_dense_ffn": True,
            "dspark_ffn_hidden_size": 256,
            "dspark_block_size": 4,
            "dspark_markov_rank": 16,
            "dspark_noise_token_id": 5,
        },
        names=((r"^", "language_model.model.dspark."), (r"dspark\.norm\.", "dspark.final_norm.")),
        is_draft=True,
        server_args={"speculative_algorithm": "DSPARK"},
        gpu="h200",
    ),
    "BailingMoeForCausalLMNextN": Published(
        "https://huggingface.co/inclusionAI/Ling-mini-2.0, sglang/srt/models/bailing_moe_nextn.py",
        {
            **DENSE,
            **EXPERTS,
            "model_type": "llama",
            "use_qkv_bias": False,
            "use_bias": False,
            "use_qk_norm": True,
            "embedding_dropout": 0.0,
            "n_group": 1,
            "topk_group": 1,
            "moe_router_enable_expert_bias": True,
            "num_nextn_predict_layers": 1,
        },
        named_in_config="BailingMoeV2ForCausalLM",
        names=(
            *_mtp_layer("model.layers.2"),
            (r"^model\.(?=final_layernorm|word_embeddings)", "model.layers.2."),
            (r"\.q_norm\.", ".query_layernorm."),
            (r"\.k_norm\.", ".key_layernorm."),
        ),
        lacks=r"^(model\.word_embeddings|lm_head)\.",
        beside="BailingMoeV2ForCausalLM",
        is_draft=True,
    ),
    "Dots3NoteForCausalLMNextN": Published(
        "sglang/srt/models/dots3_nextn.py",
        {
            **DENSE,
            **EXPERTS,
            **_MLA,
            **{f"swa_{key}": value for key, value in _MLA.items()},
            "swa_num_attention_heads": 4,
            "model_type": "dots3_note",
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window_size": 64,
        },
        names=(
            (r"^model\.heads\.0\.(?:decoder\.)?", "model.layers.2."),
            (r"^model\.embed_tokens\.", "model.mtp.embed_tokens."),
            (r"^lm_head\..*", ""),
        ),
        splits={"fused_qkv_a_g_proj_with_mqa": (("q_a_proj", 64), ("kv_a_proj_with_mqa", 80), ("g_proj", 8))},
        lacks=_TARGETS,
        beside="Dots3NoteForCausalLM",
        is_draft=True,
        gpu="h200",
    ),
    "Ernie4_5_MoeForCausalLMMTP": Published(
        "https://huggingface.co/baidu/ERNIE-4.5-21B-A3B-PT, sglang/srt/models/ernie4_eagle.py",
        of_transformers("Ernie4_5_MoeForCausalLM"),
        named_in_config="Ernie4_5_MoeForCausalLM",
        names=((r"^model\.(mtp_\w+)\.", r"model.\1.0."), (r"^lm_head\..*|^model\.embed_tokens\..*", "")),
        lacks=_TARGETS,
        beside="Ernie4_5_MoeForCausalLM",
        is_draft=True,
    ),
    "GigaChat35ForCausalLMNextN": Published(
        "sglang/srt/models/gigachat35_mtp.py",
        {
            **DENSE,
            **EXPERTS,
            **_MLA,
            "model_type": "gigachat3_5",
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "n_group": 1,
            "topk_group": 1,
            "num_nextn_predict_layers": 1,
        },
        named_in_config="GigaChat35ForCausalLM",
        names=(
            *_mtp_layer("model.layers.3"),
            (r"\.gate_(up|down)_lowrank\.", r".gate_\1_projection."),
            (r"\.attn_gate\.", ".gate_proj."),
        ),
        lacks=_TARGETS,
        beside="GigaChat35ForCausalLM",
        is_draft=True,
        gpu="h200",
    ),
    "HYV3ForCausalLMNextN": Published(
        "https://huggingface.co/tencent/Hy3-preview, sglang/srt/models/hunyuan_v3_nextn.py",
        of_transformers("HYV3ForCausalLM", num_nextn_predict_layers=1),
        named_in_config="HYV3ForCausalLM",
        names=(
            (r"^model\.shared_head\.norm\.", "model.layers.2.final_layernorm."),
            *_mtp_layer("model.layers.2"),
            (r"\.mlp\.gate\.", ".mlp.router.gate."),
        ),
        lacks=_TARGETS,
        beside="HYV3ForCausalLM",
        is_draft=True,
    ),
    "HYV4ForCausalLMNextN": Published(
        "https://huggingface.co/tencent/Hy4-preview, sglang/srt/models/hunyuan_v4_nextn.py",
        {
            **DENSE,
            **EXPERTS,
            **_MLA,
            "model_type": "hy_v4",
            "rope_scaling": None,
            "num_nextn_predict_layers": 1,
            "index_n_heads": 4,
            "index_head_dim": 64,
            "index_topk": 64,
            "hc_mult": 2,
        },
        named_in_config="HYV4ForCausalLM",
        names=(
            (r"^lm_head\..*|^model\.embed_tokens\..*", ""),
            (r"^model\.shared_head\.norm\.", "model.mtp_layers.0.final_layernorm."),
            *_mtp_layer("model.mtp_layers.0"),
            (r"\.experts\.w13_weight", ".experts.gate_up_proj"),
            (r"\.experts\.w2_weight", ".experts.down_proj"),
        ),
        splits={"wk_weights_proj": (("wk", 64), ("weights_proj", 4))},
        experts=(),
        lacks=_TARGETS,
        beside="HYV4ForCausalLM",
        is_draft=True,
        gpu="h200",
    ),
    "IQuestQ1MTP": Published(
        "sglang/srt/models/iquest_q1_mtp.py",
        {
            **DENSE,
            **EXPERTS,
            "model_type": "iquest_q1_mtp",
            "num_hidden_layers": 1,
            "num_target_layers": 2,
            "dense_intermediate_size": 256,
            "intermediate_size": 96,
            "rotary_dim": 16,
            "mlp_only_layers": [],
        },
        names=(
            (r"^model\.embed_tokens\.", "embed_tokens."),
            (r"^model\.mtp_layer\.", "mtp."),
            (r"\.experts\.w13_weight", ".experts.fc"),
            (r"\.experts\.w2_weight", ".experts.proj"),
            (r"\.mlp\.gate\.", ".mlp.router."),
        ),
        experts=(),
        server_args={"attention_backend": "fa3"},
        is_draft=True,
        gpu="h200",
    ),
    "InklingForConditionalGenerationMTP": Published(
        "https://huggingface.co/thinkingmachines/Inkling-NVFP4, sglang/srt/models/inkling.py",
        {
            "model_type": "inkling_mm_model",
            "text_config": {
                **INKLING,
                "num_nextn_predict_layers": 1,
            },
            "mtp_config": {"chain_hidden_post_norm": True},
        },
        named_in_config="InklingForConditionalGeneration",
        names=(
            (r"^model\.main_model_embed_norm\.", "model.llm.embed_norm."),
            (r"^model\.embed_tokens\.", "model.llm.embed."),
            (r"^lm_head\.", "model.llm.unembed."),
            (r"^model\.chain_norm\.", "model.mtp.chain_norm."),
            (r"^model\.(?!llm|mtp)", "model.mtp.layers.0."),
            (r"\.mlp\.gate_up_proj\.", ".mlp.w13_dn."),
            (r"\.mlp\.down_proj\.", ".mlp.w2_md."),
        ),
        splits={"qkvr": ("wq_du", "wk_dv", "wv_dv", "wr_du"), "gate_up_proj": ()},
        beside="InklingForConditionalGeneration",
        is_draft=True,
        gpu="h200",
    ),
    "NemotronHForCausalLMMTP": Published(
        "https://huggingface.co/nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16, sglang/srt/models/nemotron_h_mtp.py",
        of_transformers("NemotronHForCausalLM", num_nextn_predict_layers=1, mtp_layers_block_type=["attention", "moe"]),
        named_in_config="NemotronHForCausalLM",
        names=((r"^model\.(?!embed_tokens)", "mtp."), (r"^lm_head\..*|^model\.embed_tokens\..*", "")),
        lacks=_TARGETS,
        beside="NemotronHForCausalLM",
        is_draft=True,
    ),
    "Qwen4ExpForCausalLMMTP": Published(
        "sglang/srt/models/qwen4_exp_mtp.py",
        of_transformers("Qwen4ExpForConditionalGeneration"),
        named_in_config="Qwen4ExpForConditionalGeneration",
        names=_QWEN_MTP,
        lacks=_TARGETS,
        beside="Qwen4ExpForConditionalGeneration",
        is_draft=True,
        gpu="h200",
    ),
    "Step3p5MTP": Published(
        "https://huggingface.co/stepfun-ai/Step-3.5-Flash, sglang/srt/models/step3p5_mtp.py",
        {
            **DENSE,
            **EXPERTS,
            "model_type": "step3p5",
            # The class that transformers has for it knows no layers of different shapes.
            "auto_map": {"AutoConfig": "configuration_tiny.Nested"},
            # SGLang makes the draft as layer 45.
            "num_hidden_layers": 45,
            "rope_theta": [10000.0] * 46,
            "num_attention_groups": 2,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "share_expert_dims": 96,
            "moe_layers_enum": ",".join(map(str, range(1, 45))),
            "layer_types": [*["full_attention"] * 45, "sliding_attention"],
            "sliding_window": 128,
            "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2},
            "use_head_wise_attn_gate": True,
            "use_moe_router_bias": True,
            "need_fp32_gate": True,
            "moe_router_scaling_factor": 3.0,
            "swiglu_limits": [0.0] * 46,
            "swiglu_limits_shared": [0.0] * 46,
            "partial_rotary_factors": [0.5] * 46,
            "num_nextn_predict_layers": 1,
        },
        named_in_config="Step3p5ForCausalLM",
        names=(
            (r"^model\.lm_head\..*|^lm_head\..*", ""),
            (r"^model\.(?:mtp_block\.)?(?!embed_tokens)", "model.layers.45.transformer."),
            (r"\.shared_head\.head\.", ".shared_head.output."),
        ),
        is_draft=True,
        server_args={"enable_multi_layer_eagle": True},
    ),
    "Gemma4AssistantForCausalLM": Published(
        "https://huggingface.co/google/gemma-4-E2B-it-assistant, sglang/srt/models/gemma4_mtp.py",
        _gemma("Gemma4ForCausalLM", model_type="gemma4_assistant", use_ordered_embeddings=True),
        names=_GEMMA,
        adjust=_token_ordering,
        # An assistant attends to its target's keys and values. SGLang makes rows for its own, and nothing uses them.
        lacks=r"\.self_attn\.(qkv_proj|k_norm)\.",
        is_draft=True,
    ),
    "Gemma4UnifiedAssistantForCausalLM": Published(
        "sglang/srt/models/gemma4_mtp.py",
        _gemma("Gemma4UnifiedForConditionalGeneration", model_type="gemma4_unified_assistant"),
        names=_GEMMA,
        adjust=_layer_scalars,
        lacks=r"\.self_attn\.(qkv_proj|k_norm)\.",
        is_draft=True,
    ),
}
