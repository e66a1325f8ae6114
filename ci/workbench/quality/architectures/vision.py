"""Models that see or hear."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from workbench.quality.families import Config
from workbench.quality.published import Published, Tensors, of_transformers
from workbench.quality.sizes import DENSE, EXPERTS, MLA

_MLA: Config = {
    **DENSE,
    **EXPERTS,
    **MLA,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 1.0,
}
"""Of a language model as DeepSeek-V3."""

_YARN: Config = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 40,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
"""Without scaling, SGLang has no rotation for DeepSeek's attention on a CPU."""

_VIT: Config = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
"""Of a vision tower."""

_QWEN3_VIT: Config = {
    "depth": 2,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_heads": 4,
    "num_position_embeddings": 64,
    "out_hidden_size": 128,
    "deepstack_visual_indexes": [],
}
"""Of Qwen3-VL's vision tower."""

_MOONVIT: Config = {**_VIT, "init_pos_emb_height": 4, "init_pos_emb_width": 4, "merge_kernel_size": [2, 2]}

_MOONVIT_NAMES = (
    (r"\.attn\.qkv_proj\.", ".wqkv."),
    (r"^(vision_tower\..*)\.attn\.proj\.", r"\1.wo."),
)

_FUSED = {r"(vision_tower|vision_model|visual|vision)\..*": ()}
"""Of vision towers whose checkpoints keep q, k and v in one matrix."""

_QKV = (r"\.qkv_proj\.", ".qkv.")
"""What :data:`_FUSED` leaves."""

_QWEN3_VL_NAMES = (
    (r"^model\.", "model.language_model."),
    (r"^visual\.", "model.visual."),
    _QKV,
)

_STACKED = ((r"\.experts\.w13_weight$", ".experts.gate_up_proj"), (r"\.experts\.w2_weight$", ".experts.down_proj"))
"""Experts in one tensor."""


def _with_transposed_experts(tensors: Tensors) -> Tensors:
    return _transposed(tensors, r"\.experts\.(gate_up|down)_proj$")


def _with_transposed_gates(tensors: Tensors) -> Tensors:
    return _transposed(tensors, r"\.mlp\.gate\.weight")


def _transposed(tensors: Tensors, pattern: str) -> Tensors:
    """Those whose names match as ``[..., inputs, outputs]``."""
    return {
        name: ((*shape[:-2], shape[-1], shape[-2]) if re.search(pattern, name) else shape, dtype)
        for name, (shape, dtype) in tensors.items()
    }


def _with_flat_a_log(tensors: Tensors) -> Tensors:
    """``A_log`` in one dimension."""
    return {
        name: ((math.prod(shape),) if name.endswith(".A_log") else shape, dtype)
        for name, (shape, dtype) in tensors.items()
    }


_QWEN3_5 = Published(
    "https://huggingface.co/Qwen/Qwen3.5-35B-A3B, qwen3_5.py",
    {},
    names=(
        *_QWEN3_VL_NAMES,
        (r"(layers\.\d+)\.(?=[qkvo]_proj|[qk]_norm)", r"\1.self_attn."),
        *_STACKED,
    ),
    splits={
        **_FUSED,
        "in_proj_qkvz": (("in_proj_qkv", 256), ("in_proj_z", 128)),
        "in_proj_ba": (("in_proj_b", 4), ("in_proj_a", 4)),
    },
    experts=(),
)

_BAILING_MM = Published(
    "https://huggingface.co/inclusionAI/Ming-flash-omni-Preview, bailing_mm.py",
    {
        "model_type": "bailingmm_moe_v2_lite",
        "llm_config": {**DENSE, **EXPERTS, "use_qk_norm": True, "use_bias": False, "n_group": 1, "topk_group": 1},
        "vision_config": {**_QWEN3_VIT, "architectures": ["Qwen3_VisionTransformer"]},
        "mlp_depth": 2,
        "mrope_section": [4, 2, 2],
    },
    names=(
        _QKV,
        (r"\.attention\.q_norm\.", ".attention.query_layernorm."),
        (r"\.attention\.k_norm\.", ".attention.key_layernorm."),
    ),
    splits=_FUSED,
)

ARCHITECTURES: dict[str, Published] = {
    "Qwen3VLMoeForConditionalGeneration": Published(
        "https://huggingface.co/Qwen/Qwen3-VL-30B-A3B-Instruct, qwen3_vl_moe.py",
        of_transformers("Qwen3VLMoeForConditionalGeneration"),
        names=(*_QWEN3_VL_NAMES, *_STACKED),
        splits=_FUSED,
        experts=(),
        adjust=_with_transposed_experts,
    ),
    "Qwen3OmniMoeForConditionalGeneration": Published(
        "https://huggingface.co/Qwen/Qwen3-Omni-30B-A3B-Instruct, qwen3_omni_moe.py",
        of_transformers("Qwen3OmniMoeForConditionalGeneration"),
        names=(
            _QKV,
            (r"(audio_tower\..*\.self_attn)\.proj\.", r"\1.out_proj."),
        ),
        splits=_FUSED,
    ),
    "KimiK25ForConditionalGeneration": Published(
        "https://huggingface.co/moonshotai/Kimi-K2.5, kimi_k25.py",
        {
            "model_type": "kimi_k25",
            "text_config": {**_MLA, "architectures": ["DeepseekV3ForCausalLM"], "rope_scaling": _YARN},
            "vision_config": {**_MOONVIT, "init_pos_emb_time": 2, "vt_hidden_size": 128, "text_hidden_size": 128},
        },
        names=(
            *_MOONVIT_NAMES,
            (r"^mm_projector\.linear_1\.", "mm_projector.proj.0."),
            (r"^mm_projector\.linear_2\.", "mm_projector.proj.2."),
        ),
        splits=_FUSED,
    ),
    "KimiK3ForConditionalGeneration": Published(
        "sglang/srt/models/kimi_k3.py",
        {
            "model_type": "kimi_k3",
            "text_config": {
                **_MLA,
                "model_type": "kimi_linear",
                "num_experts_per_token": 2,
                "hidden_act": "situ",
                "activation_situ_beta": 4.0,
                "activation_situ_linear_beta": 25.0,
                "attn_res_block_size": 1,
                "routed_expert_hidden_size": 64,
                "latent_moe_use_norm": True,
                "mla_use_nope": True,
                "mla_use_output_gate": True,
                "linear_attn_config": {
                    "kda_layers": [1],
                    "full_attn_layers": [2],
                    "num_heads": 4,
                    "head_dim": 32,
                    "short_conv_kernel_size": 4,
                    "use_full_rank_gate": True,
                },
            },
            "vision_config": {
                "init_pos_emb_height": 4,
                "init_pos_emb_width": 4,
                "init_pos_emb_time": 2,
                "vt_num_attention_heads": 4,
                "vt_num_hidden_layers": 2,
                "vt_hidden_size": 96,
                "vt_intermediate_size": 192,
                "qkv_hidden_size": 128,
                "text_hidden_size": 128,
            },
        },
        names=(
            (r"\.mlp\.(?=experts|gate\.|shared_experts|routed_expert)", ".block_sparse_moe."),
            # The same parameter, which decoding has by another name.
            (r"\._bfa_f_b_w$", ".f_b_proj.weight"),
        ),
        splits={
            "fused_qkvg_proj": ("q_proj", "k_proj", "v_proj", "g_proj"),
            "qkv_conv1d": ("q_conv1d", "k_conv1d", "v_conv1d"),
        },
        experts=("w1", "w3", "w2"),
        adjust=_with_flat_a_log,
        gpu="h200",
    ),
    "KimiVLForConditionalGeneration": Published(
        "https://huggingface.co/moonshotai/Kimi-VL-A3B-Instruct, kimi_vl.py",
        {
            "model_type": "kimi_vl",
            "text_config": {**_MLA, "q_lora_rank": None},
            "vision_config": _MOONVIT,
        },
        names=_MOONVIT_NAMES,
        splits=_FUSED,
        gpu="h200",
    ),
    "InternVLChatModel": Published(
        "https://huggingface.co/OpenGVLab/InternVL3_5-30B-A3B, internvl.py",
        {
            "model_type": "internvl_chat",
            "llm_config": {**DENSE, **EXPERTS, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"},
            "vision_config": {**_VIT, "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False},
        },
        names=((r"\.attn\.attn\.", ".attn."), _QKV),
        splits=_FUSED,
    ),
    "InternS1ForConditionalGeneration": Published(
        "https://huggingface.co/internlm/Intern-S1, interns1.py",
        {
            "text_config": {**DENSE, **EXPERTS, "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False},
            "vision_config": {
                **_VIT,
                "num_channels": 3,
                "norm_type": "layer_norm",
                "layer_norm_eps": 1e-6,
                "hidden_act": "gelu",
                "attention_bias": True,
                "use_qk_norm": False,
                "dropout": 0.0,
                "drop_path_rate": 0.0,
                "initializer_factor": 0.1,
            },
            "vision_feature_layer": -1,
            "downsample_ratio": 0.5,
        },
        names=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
            (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
            (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
            (r"^vision_model\.", "model.vision_tower."),
            (r"embeddings\.class_embedding", "embeddings.cls_token"),
            (r"embeddings\.patch_embedding\.", "embeddings.patch_embeddings.projection."),
            (r"embeddings\.position_embedding", "embeddings.position_embeddings"),
            (r"^(model\.vision_tower\.encoder)\.layers\.", r"\1.layer."),
            (r"\.attn\.attn\.", ".attention."),
            (r"\.attention\.proj\.", ".attention.projection_layer."),
            (r"\.ls([12])$", r".lambda_\1"),
            (r"\.norm1\.", ".layernorm_before."),
            (r"\.norm2\.", ".layernorm_after."),
        ),
    ),
    "InternS1ProForConditionalGeneration": Published(
        "sglang/srt/models/interns1pro.py",
        of_transformers(
            "Qwen3VLMoeForConditionalGeneration",
            **{
                "text_config.rope_scaling": {
                    "rope_type": "default",
                    "mrope_section": [8, 4, 4],
                    "fope_init_factor": 0.5,
                    "fope_sep_head": True,
                    "num_inv_freq": None,
                },
                "text_config.router_n_groups": 2,
                "vision_config.deepstack_visual_indexes": [],
            },
        ),
        names=((r"^model\.layers\.0\.self_attn\.rotary_emb\.", "model.rotary_emb."), *_QWEN3_VL_NAMES),
        splits=_FUSED,
    ),
    "LightOnOCRForConditionalGeneration": Published(
        "https://huggingface.co/lightonai/LightOnOCR-2-1B, lightonocr.py",
        {
            "model_type": "mistral3",
            "text_config": {**DENSE, "model_type": "qwen3"},
            "vision_config": {**_VIT, "model_type": "pixtral", "head_dim": 32, "rope_theta": 10000.0},
            "image_token_id": 3,
            "spatial_merge_size": 2,
            "multimodal_projector_bias": False,
        },
        names=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^(vision_encoder\..*\.attention)\.proj\.", r"\1.o_proj."),
            (r"^vision_encoder\.", "model.vision_encoder."),
            (r"^vision_projection_norm\.", "model.vision_projection.norm."),
            (r"^patch_merger\.", "model.vision_projection.patch_merger."),
            (r"^vision_language_adapter\.w_in\.", "model.vision_projection.linear_1."),
            (r"^vision_language_adapter\.w_out\.", "model.vision_projection.linear_2."),
        ),
    ),
    "DotsOCRForCausalLM": Published(
        "https://huggingface.co/rednote-hilab/dots.ocr, dots_ocr.py",
        {
            **DENSE,
            "model_type": "dots_ocr",
            "vision_config": {**_VIT, "embed_dim": 96},
        },
        names=(
            (r"^lm_head\..*", ""),
            (r"^model\.(?=model\.|lm_head\.)", ""),
            (r"^visual\.", "vision_tower."),
            _QKV,
        ),
        splits=_FUSED,
        lacks=r"^lm_head\.",
    ),
    "DotsVLMForCausalLM": Published(
        "https://huggingface.co/rednote-hilab/dots.vlm1.inst, dots_vlm.py",
        {
            **_MLA,
            "model_type": "dots_vlm",
            "rope_scaling": _YARN,
            "vision_config": {**_VIT, "embed_dim": 96},
        },
        names=((r"^language_model\.", ""), _QKV),
        splits=_FUSED,
    ),
    "Cosmos3ForConditionalGeneration": Published(
        "https://huggingface.co/nvidia/Cosmos3-Nano, cosmos3.py",
        of_transformers("Qwen3VLForConditionalGeneration", model_type="cosmos3_omni", tie_word_embeddings=False),
        names=(
            (r"^(model|visual)\.", ""),
            (r"^(layers\..*)\.([qkv])_proj\.", r"\1.to_\2."),
            (r"^(layers\..*)\.o_proj\.", r"\1.to_out."),
            (r"^(layers\..*)\.([qk])_norm\.", r"\1.norm_\2."),
            _QKV,
        ),
        splits=_FUSED,
        files={
            r"^(blocks|merger|patch_embed|pos_embed|deepstack_merger_list)\.": "vision_encoder/model.safetensors",
            "": "transformer/diffusion_pytorch_model.safetensors",
        },
    ),
    "JetVLMForConditionalGeneration": Published(
        "sglang/srt/models/jet_vlm.py",
        {
            "model_type": "jet_vlm",
            "text_config": {
                **DENSE,
                "model_type": "jet_nemotron",
                "layer_types": ["jet", "attn"],
                "efficient_attention_config": {
                    "jet": {
                        "mode": "chunk",
                        "expand_v": 2.0,
                        "num_heads": 2,
                        "head_dim": 32,
                        "norm_eps": "1e-5",
                        "conv_size": 4,
                        "dconv_generator_reduction": 8,
                        "dconv_implementation": "triton",
                    },
                },
            },
            "vision_config": {**_VIT, "model_type": "siglip_vision_model"},
        },
        splits={"qkvabz_proj": ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj")},
    ),
    "InternS2PreviewForConditionalGeneration": replace(
        _QWEN3_5,
        source="sglang/srt/models/interns2preview.py",
        config=of_transformers("Qwen3_5MoeForConditionalGeneration", model_type="intern_s2_preview"),
    ),
    "InternS2MobiusForConditionalGeneration": replace(
        _QWEN3_5,
        source="sglang/srt/models/interns2_mobius.py",
        config=of_transformers(
            "Qwen3_5MoeForConditionalGeneration", model_type="interns2_mobius", **{"text_config.num_blocks": 2}
        ),
        # The architecture's default, triton_kernel, expects experts in a layout that fp8 does not give them.
        server_args={"moe_runner_backend": "triton"},
    ),
    "Gemma3ForConditionalGeneration": Published(
        "https://huggingface.co/google/gemma-3-4b-it, gemma3_mm.py",
        of_transformers("Gemma3ForConditionalGeneration", mm_tokens_per_image=16, **{"vision_config.image_size": 112}),
        names=((r"^(vision_tower\..*\.self_attn)\.proj\.", r"\1.out_proj."),),
    ),
    "GlmAsrForConditionalGeneration": Published(
        "https://huggingface.co/zai-org/GLM-ASR-Nano-2512, glmasr.py",
        of_transformers("GlmAsrForConditionalGeneration"),
    ),
    "Ernie4_5_VLMoeForConditionalGeneration": Published(
        "https://huggingface.co/baidu/ERNIE-4.5-VL-28B-A3B-PT, ernie45_vl.py",
        {
            **DENSE,
            "moe_intermediate_size": [96, 64],
            "moe_num_experts": [4, 4],
            "moe_k": 2,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": [1, 1],
            "moe_layer_end_index": [1, 1],
            "moe_layer_interval": 1,
            "use_bias": False,
            "use_moe": True,
            "rope_scaling": {"type": "default", "mrope_section": [6, 6, 4]},
            "freq_allocation": 4,
            "im_patch_id": 3,
            "pixel_hidden_size": 128,
            "spatial_conv_size": 2,
            "temporal_conv_size": 2,
            "use_temporal_conv": True,
            "vision_config": {
                "depth": 2,
                "embed_dim": 128,
                "hidden_size": 128,
                "in_chans": 3,
                "mlp_ratio": 2,
                "num_heads": 4,
                "patch_size": 14,
                "spatial_merge_size": 2,
            },
        },
        names=(
            _QKV,
            (r"^resampler_model\.", "model.resampler_model."),
            (r"(spatial|temporal)_linear1\.", r"\1_linear.0."),
            (r"(spatial|temporal)_linear2\.", r"\1_linear.2."),
            (r"(spatial|temporal)_norm\.", r"\1_linear.3."),
            (r"\.text_experts_gate\.weight", ".gate.weight"),
            (r"\.vision_experts_gate\.weight", ".gate.weight_1"),
            (r"\.mlp\.e_score", ".mlp.moe_statics.e_score"),
            (r"\.text_experts\.", ".experts."),
            *((rf"\.vision_experts\.{number}\.", f".experts.{4 + number}.") for number in range(4)),
        ),
        splits=_FUSED,
        adjust=_with_transposed_gates,
        gpu="h200",
    ),
    "DeepseekVL2ForCausalLM": Published(
        "https://huggingface.co/deepseek-ai/deepseek-vl2, deepseek_vl2.py",
        {
            "model_type": "deepseek_vl_v2",
            "language_config": {
                **_MLA,
                "architectures": ["DeepseekV2ForCausalLM"],
                "q_lora_rank": None,
                "rope_scaling": _YARN,
            },
            "projector_config": {"projector_type": "downsample_mlp_gelu", "input_dim": 1152, "n_embed": 128},
            "vision_config": {},
            "tile_tag": "2D",
        },
        names=((r"^language_model\.", "language."),),
    ),
    "DeepseekOCRForCausalLM": Published(
        "https://huggingface.co/deepseek-ai/DeepSeek-OCR, deepseek_ocr.py",
        {
            "model_type": "deepseek_vl_v2",
            "auto_map": {"AutoModel": "modeling_deepseekocr.DeepseekOCRForCausalLM"},
            "language_config": {**_MLA, "use_mla": False, "topk_method": "greedy"},
            "projector_config": {"projector_type": "linear", "input_dim": 2048, "n_embed": 128},
            "vision_config": {},
            "tile_tag": "2D",
        },
        names=(
            (r"^(?!model\.)", "model."),
            (r"^model\.model\.", "model."),
            (r"^model\.lm_head\.", "lm_head."),
        ),
    ),
    "Cosmos3EdgeForConditionalGeneration": Published(
        "https://huggingface.co/nvidia/Cosmos3-Edge, cosmos3_edge.py",
        of_transformers("Cosmos3EdgeForConditionalGeneration"),
        names=(
            (r"^model\.", ""),
            (r"^(layers\..*)\.([qkv])_proj\.", r"\1.to_\2."),
            (r"^(layers\..*)\.o_proj\.", r"\1.to_out."),
            (r"^visual\.vision_model\.", "model.visual."),
            (r"^projector\.", "model.projector."),
            (r"\.self_attn\.attn\.(?=[qkv]_proj)", ".self_attn."),
            (r"\.self_attn\.attn\.proj\.", ".self_attn.out_proj."),
        ),
        files={
            r"^model\.": "vision_encoder/model.safetensors",
            "": "transformer/diffusion_pytorch_model.safetensors",
        },
    ),
    "BailingMMNativeForConditionalGeneration": _BAILING_MM,
    "BailingMM2NativeForConditionalGeneration": _BAILING_MM,
    "BailingMoeV3VLForConditionalGeneration": Published(
        "sglang/srt/models/bailing_mm_v3.py",
        {
            "model_type": "bailing_moe_v3_vl",
            "text_config": {
                **_MLA,
                "layer_group_size": 2,
                "short_conv_kernel_size": 4,
                "no_kda_lora": True,
                "moe_router_enable_expert_bias": True,
                "score_function": "sigmoid",
            },
            "vision_config": _QWEN3_VIT,
            "mrope_section": [4, 2, 2],
        },
        names=(
            (r"^model\.model\.", "model."),
            (r"^model\.lm_head\.", "lm_head."),
            (r"^visual\.", "model.visual."),
            _QKV,
        ),
        splits={
            **_FUSED,
            "fused_qkvbfg_proj": ("q_proj", "k_proj", "v_proj", "b_proj", "f_proj", "g_proj"),
            "qkv_conv1d": ("q_conv1d", "k_conv1d", "v_conv1d"),
        },
        adjust=_with_flat_a_log,
        gpu="h200",
    ),
}
