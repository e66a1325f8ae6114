"""Models that see or hear: those whose code came with their checkpoints, or whose published form SGLang renames most.

The others are in ``vision.py``.
"""

from __future__ import annotations

from dataclasses import replace

from workbench.quality.families import Config
from workbench.quality.published import Published, Tensors, of_transformers
from workbench.quality.sizes import DENSE, EXPERTS, INKLING, LLAMA

_QWEN2: Config = {**DENSE, "model_type": "qwen2", "layer_types": ["full_attention"] * 2}
_QWEN3: Config = {**_QWEN2, "model_type": "qwen3"}
_SIGLIP: Config = {
    "model_type": "siglip_vision_model",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_channels": 3,
    "image_size": 56,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
}
_QWEN2_VISION: Config = {
    "depth": 2,
    "embed_dim": 128,
    "hidden_size": 128,
    "num_heads": 4,
    "mlp_ratio": 2,
    "in_channels": 3,
    "in_chans": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "hidden_act": "quick_gelu",
}
_PERCEPTION: Config = {
    "width": 128,
    "layers": 2,
    "heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "mlp_ratio": 2.0,
    "hidden_act": "quick_gelu",
    "output_dim": None,
    "use_cls_token": False,
    "use_ln_pre": True,
    "use_ln_post": False,
    "use_abs_posemb": True,
    "use_rope2d": True,
    "ls_init_value": 0.1,
}
_LLAVA: Config = {
    **DENSE,
    "model_type": "llava",
    "mm_hidden_size": 128,
    "mm_vision_tower": "{checkpoint}/clip/CLIPVisionModel",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "spatial_unpad",
    "image_aspect_ratio": "anyres",
}
_NEMOTRON: Config = {
    **DENSE,
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "ME*-",
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 192,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "ssm_state_size": 16,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
}
_RADIO: Config = {"args": {"model": "vit_small_patch16_224", "register_multiple": 16}, "patch_size": 16}
_NEMOTRON_VL: Config = {
    "model_type": "NemotronH_Nano_VL_V2",
    "llm_config": _NEMOTRON,
    "vision_config": _RADIO,
    "vit_hidden_size": 384,
    "projector_hidden_size": 192,
}
_PARAKEET: Config = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "num_mel_bins": 16,
    "subsampling_factor": 8,
    "subsampling_conv_channels": 32,
    "projection_hidden_size": 192,
    "projection_bias": False,
    "sampling_rate": 16000,
}

_PERCEPTION_NAMES = (
    (r"^language_model\.", ""),
    (r"\.attn\.qkv_proj\.(weight|bias)$", r".attn.in_proj_\1"),
    (r"\.attn\.proj\.", ".attn.out_proj."),
    (r"(resblocks\.\d+\.mlp)\.fc1\.", r"\1.c_fc."),
    (r"(resblocks\.\d+\.mlp)\.fc2\.", r"\1.c_proj."),
)
_NEMOTRON_NAMES = (
    (r"^language_model\.model\.", "language_model.backbone."),
    (r"\.embed_tokens\.", ".embeddings."),
    (r"\.mixer\.A$", ".mixer.A_log"),
    (r"^sound_encoder\.projection\.", "sound_projection."),
    # The published encoder has no layer scale: SGLang's has ones.
    (r"^vision_model\..*\.ls[12]$", ""),
)
_LLAVA_NAMES = (
    (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
    (r"^language_model\.", ""),
)


def _stacked_experts(tensors: Tensors) -> Tensors:
    """All experts of a layer as three tensors beside them."""
    found: Tensors = {}
    for name, (shape, dtype) in tensors.items():
        owner, _, leaf = name.rpartition(".experts.")
        if leaf == "w13_weight":
            half = (shape[0], shape[1] // 2, *shape[2:])
            found |= {f"{owner}.{part}.weight": (half, dtype) for part in ("gate_proj", "up_proj")}
        else:
            found[f"{owner}.down_proj.weight" if leaf == "w2_weight" else name] = (shape, dtype)
    return found


def _short_convolutions(tensors: Tensors) -> Tensors:
    """Those of one channel with that dimension, which SGLang's parameter lacks."""
    found: Tensors = {}
    for name, (shape, dtype) in tensors.items():
        is_convolution = name.endswith(".conv.conv_weight")
        published = name.replace(".conv.conv_weight", ".conv.conv.weight")
        found[published] = ((shape[0], 1, shape[1]) if is_convolution else shape, dtype)
    return found


_LLAVA_LLAMA = Published(
    "https://huggingface.co/liuhaotian/llava-v1.6-vicuna-7b, llava.py",
    _LLAVA,
    names=_LLAVA_NAMES,
    towers={"clip": "CLIPVisionModel"},
)
_NEMOTRON_V2 = Published(
    "https://huggingface.co/nvidia/NVIDIA-Nemotron-Nano-12B-v2-VL-BF16, nano_nemotron_vl.py, radio.py",
    _NEMOTRON_VL,
    splits={r"vision_model\..*\.qkv_proj": ()},
    names=(
        *_NEMOTRON_NAMES,
        (r"^vision_model\.model\.encoder\.layers\.", "vision_model.radio_model.model.blocks."),
        (r"^vision_model\.model\.", "vision_model.radio_model.model."),
        (r"\.attn\.attn\.qkv_proj\.", ".attn.qkv."),
        (r"\.attn\.attn\.proj\.", ".attn.proj."),
    ),
    experts=("", "up_proj", "down_proj"),
)
_NVILA = Published(
    "sglang/srt/models/nvila.py",
    {"text_config": _QWEN2, "vision_config": _SIGLIP},
    names=((r"^vision_tower\.", "vision_tower.vision_model."),),
)

ARCHITECTURES: dict[str, Published] = {
    "Cohere2VisionForConditionalGeneration": Published(
        "sglang/srt/models/cohere2_vision.py, cohere2_moe.py",
        of_transformers(
            "Cohere2VisionForConditionalGeneration",
            alignment_intermediate_size=384,
            text_config={
                **DENSE,
                "model_type": "cohere2_moe",
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "num_shared_experts": 1,
                "first_k_dense_replace": 1,
                "prefix_dense_intermediate_size": 192,
                "sliding_window": 64,
                "layer_types": ["sliding_attention", "full_attention"],
            },
        ),
        names=(
            (r"^language_model\.model\.", "language_model."),
            (r"^vision_tower\.", "vision_tower.vision_model."),
            (r"^", "model."),
        ),
    ),
    "InklingForConditionalGeneration": Published(
        "https://huggingface.co/thinkingmachines/Inkling-NVFP4, conversion_mapping.py of transformers, inkling.py",
        {
            "model_type": "inkling_mm_model",
            "text_config": {
                **INKLING,
                "use_gate_bias": True,
                "use_global_scale": True,
                "shared_expert_sink": True,
                "num_nextn_predict_layers": 0,
            },
            "audio_config": {"decoder_dmodel": 128},
            "vision_config": {"decoder_dmodel": 128},
        },
        splits={"qkvr": ("wq_du", "wk_dv", "wv_dv", "wr_du"), "gate_up_proj": ()},
        names=(
            (r"^llm\.embed_tokens\.", "llm.embed."),
            (r"^llm\.lm_head\.", "llm.unembed."),
            (r"\.mlp\.gate_up_proj\.", ".mlp.w13_dn."),
            (r"\.mlp\.down_proj\.", ".mlp.w2_md."),
            (r"\.shared_experts\.(w13|w2)_weight$", r".shared_experts.shared_\1_weight"),
            (r"^visual\.vision_encoder\.", "visual."),
            (r"^", "model."),
        ),
        experts=(),
        server_args={"disable_radix_cache": False, "enable_multimodal": True},
        gpu="h200",
    ),
    "Lfm2VlForConditionalGeneration": Published(
        "https://huggingface.co/LiquidAI/LFM2-VL-1.6B, lfm2_vl.py, siglip2.py",
        of_transformers(
            "Lfm2VlForConditionalGeneration",
            **{"projector_hidden_size": 192, "text_config.layer_types": ["conv", "full_attention"]},
        ),
        names=(
            (r"^(?!language_model\.)", "model."),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"\.self_attn\.attn\.proj\.", ".self_attn.out_proj."),
            (r"\.self_attn\.attn\.", ".self_attn."),
        ),
        adjust=_short_convolutions,
    ),
    "LlavaForConditionalGeneration": Published(
        "https://huggingface.co/mistral-community/pixtral-12b, llava.py, pixtral.py",
        {
            "model_type": "llava",
            "text_config": {**DENSE, "model_type": "mistral"},
            "vision_config": {**_SIGLIP, "model_type": "pixtral", "head_dim": 32, "rope_theta": 10000.0},
            "image_token_index": 10,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        names=((r"\.attention\.proj\.", ".attention.o_proj."),),
    ),
    "LlavaLlamaForCausalLM": _LLAVA_LLAMA,
    "LlavaMistralForCausalLM": replace(
        _LLAVA_LLAMA, source="https://huggingface.co/liuhaotian/llava-v1.6-mistral-7b, llava.py"
    ),
    "LlavaQwenForCausalLM": replace(
        _LLAVA_LLAMA,
        source="https://huggingface.co/lmms-lab/llava-onevision-qwen2-7b-ov, llava.py",
        config={**_LLAVA, "mm_vision_tower": "{checkpoint}/siglip/SiglipVisionModel"},
        towers={"siglip": "SiglipVisionModel"},
    ),
    "LlavaVidForCausalLM": replace(
        _LLAVA_LLAMA, source="https://huggingface.co/lmms-lab/LLaVA-NeXT-Video-7B, llavavid.py"
    ),
    "LocateAnythingForConditionalGeneration": Published(
        "https://huggingface.co/nvidia/LocateAnything-3B, locate_anything.py",
        {
            "model_type": "locateanything",
            "text_config": _QWEN2,
            "vision_config": {
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "init_pos_emb_height": 8,
                "init_pos_emb_width": 8,
                "merge_kernel_size": [2, 2],
                "patch_size": 14,
            },
        },
        splits={r"attn\.qkv_proj": ()},
        names=(
            (r"^vision_tower\.", "vision_model."),
            (r"\.attn\.qkv_proj\.", ".wqkv."),
            (r"\.attn\.proj\.", ".wo."),
            (r"^multi_modal_projector\.pre_norm\.", "mlp1.0."),
            (r"^multi_modal_projector\.linear_1\.", "mlp1.1."),
            (r"^multi_modal_projector\.linear_2\.", "mlp1.3."),
        ),
    ),
    "MiDashengLMModel": Published(
        "https://huggingface.co/mispeech/midashenglm-7b, midashenglm.py",
        {
            "text_config": {**_QWEN2, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            "audio_encoder_config": {
                "embed_dim": 128,
                "depth": 2,
                "num_heads": 4,
                "mlp_ratio": 2.0,
                "qkv_bias": True,
                "init_values": None,
                "input_channels": 1,
                "patch_size": [64, 4],
                "patch_stride": [64, 4],
                "target_length": 64,
                "n_mels": 64,
                "n_fft": 512,
                "hop_length": 160,
                "win_length": 512,
                "center": True,
                "f_min": 0.0,
                "f_max": 8000.0,
                "sample_rate": 16000,
            },
            "subsample_factor": 5,
        },
        splits={r"attn\.qkv_proj": ()},
        names=(
            (r"^language_model\.", "decoder."),
            (r"\.attn\.attn\.qkv_proj\.", ".attn.qkv."),
            (r"\.attn\.attn\.proj\.", ".attn.proj."),
            (r"^audio_projector\.fc1\.", "audio_projector.net.0."),
            (r"^audio_projector\.fc2\.", "audio_projector.net.2."),
        ),
    ),
    "MiMoV2ASRForCausalLM": Published(
        "sglang/srt/models/mimo_v2_asr.py, mimo_audio.py",
        {
            **_QWEN2,
            "audio_config": {
                "speech_vocab_size": "65-65",
                "speech_zeroemb_idx": "64-64",
                "audio_channels": 2,
                "input_local_layers": 2,
                "input_local_dim": 64,
                "input_local_attn_heads": 4,
                "input_local_head_dim": 16,
                "input_local_intermediate_size": 128,
                "out_hidden_size": 128,
            },
        },
        names=(
            (r"^audio_tokenizer\.", ""),
            (r"^(encoder\..*\.self_attn)\.attn\.proj\.", r"\1.out_proj."),
            (r"^(encoder\..*\.self_attn)\.attn\.", r"\1."),
        ),
        files={r"^encoder\.": "audio_tokenizer/model.safetensors", "": "model.safetensors"},
        towers={
            "audio_tokenizer": {
                "d_model": 64,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 128,
                "n_mels": 16,
                "num_quantizers": 2,
                "codebook_size": [32, 32],
            }
        },
        gpu="h200",
    ),
    "MiniCPMO": Published(
        "https://huggingface.co/openbmb/MiniCPM-o-2_6, minicpmo.py",
        {
            **DENSE,
            "version": "2.6",
            "query_num": 64,
            "drop_vision_last_layer": False,
            "vision_config": _SIGLIP,
            "init_vision": True,
            "audio_pool_step": 2,
            "audio_chunk_length": 1.0,
            "audio_config": {
                "d_model": 64,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 256,
                "num_mel_bins": 16,
                "max_source_positions": 32,
                "attention_dropout": 0.0,
                "dropout": 0.0,
                "activation_dropout": 0.0,
                "encoder_layerdrop": 0.0,
                "activation_function": "gelu",
                "scale_embedding": False,
                "pad_token_id": 0,
            },
        },
        names=((r"^(vpm\..*\.self_attn)\.proj\.", r"\1.out_proj."),),
    ),
    "MiniCPMV": Published(
        "https://huggingface.co/openbmb/MiniCPM-V-2_6, minicpmv.py",
        {
            **DENSE,
            "version": 2.6,
            "query_num": 64,
            "drop_vision_last_layer": False,
            "vision_config": _SIGLIP,
        },
        names=((r"^(vpm\..*\.self_attn)\.proj\.", r"\1.out_proj."),),
    ),
    "MiniMaxM3SparseForConditionalGeneration": Published(
        "sglang/srt/models/minimax_m3_vl.py, conversion_mapping.py of transformers",
        {
            "model_type": "minimax_m3_vl",
            "text_config": {
                **DENSE,
                **EXPERTS,
                "model_type": "minimax_m2",
                "num_hidden_layers": 3,
                "hidden_act": "swigluoai",
                "swiglu_alpha": 1.702,
                "swiglu_limit": 7.0,
                "intermediate_size": 96,
                "dense_intermediate_size": 256,
                "moe_layer_freq": [0, 1, 1],
                "rotary_dim": 16,
                "use_qk_norm": True,
                "qk_norm_type": "per_head",
                "use_gemma_norm": True,
                "scoring_func": "sigmoid",
                "use_routing_bias": True,
                "sparse_attention_config": {
                    "use_sparse_attention": True,
                    "sparse_num_index_heads": 2,
                    "sparse_index_dim": 32,
                    "sparse_block_size": 128,
                    "sparse_topk_blocks": 16,
                    "sparse_attention_freq": [0, 1, 1],
                    "sparse_disable_index_value": [0, 1, 1],
                },
            },
            "vision_config": {
                **_SIGLIP,
                "model_type": "clip_vision_model",
                "hidden_act": "gelu",
                "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2},
                "position_embedding_type": "rope",
                "rope_mode": "3d",
                "rope_theta": 10000.0,
                "vision_segment_max_frames": 4,
            },
        },
        names=(
            (r"^(?=model\.|lm_head\.)", "language_model."),
            # On a GPU, the shared expert is the last of SGLang's experts.
            (r"\.experts\.4\.w1\.", ".shared_experts.gate_proj."),
            (r"\.experts\.4\.w3\.", ".shared_experts.up_proj."),
            (r"\.experts\.4\.w2\.", ".shared_experts.down_proj."),
            (r"(?<=\d)\.mlp\.(?=experts\.|gate\.|e_score|shared_experts\.)", ".block_sparse_moe."),
            (r"^vision_tower\.(?=multi_modal_projector\.|patch_merge_mlp\.)", ""),
            (r"^(vision_tower\..*\.self_attn)\.proj\.", r"\1.out_proj."),
            (r"^(vision_tower\..*)\.(fc\d)\.", r"\1.mlp.\2."),
        ),
        splits={"index_qkv_proj": (("index_q_proj", 64), ("index_k_proj", 32))},
        experts=("w1", "w3", "w2"),
        gpu="h200",
    ),
    "MossVLForConditionalGeneration": Published(
        "sglang/srt/models/moss_vl.py",
        {
            "text_config": {
                **_QWEN3,
                "attention_bias": False,
                "cross_attention_layers": [1],
                "rope_scaling": {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True},
            },
            "vision_config": {
                **_QWEN2_VISION,
                "intermediate_size": 256,
                "out_hidden_size": 128,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
                "hidden_act": "gelu_pytorch_tanh",
            },
        },
        splits={r"visual\..*\.attn\.qkv_proj": ()},
        names=(
            (r"^language_model\.model\.", "model.language_model."),
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^(?=visual\.|separator_token)", "model."),
            (r"\.attn\.qkv_proj\.", ".attn.qkv."),
        ),
        server_args={"attention_backend": "flashinfer"},
        gpu="h200",
    ),
    "MultiModalityCausalLM": Published(
        "https://huggingface.co/deepseek-ai/Janus-Pro-7B, deepseek_janus_pro.py",
        {
            "model_type": "multi_modality",
            "language_config": LLAMA,
            "vision_config": {
                "cls": "CLIPVisionTower",
                "params": {"model_name": "siglip_large_patch16_384", "image_size": 384, "select_layer": 1},
            },
            "aligner_config": {
                "cls": "MlpProjector",
                "params": {"projector_type": "mlp_gelu", "input_dim": 1024, "n_embed": 128, "depth": 2},
            },
            "gen_vision_config": {"cls": "VQ-16", "params": {"image_token_size": 64, "n_embed": 8}},
            "gen_aligner_config": {
                "cls": "MlpProjector",
                "params": {"projector_type": "mlp_gelu", "input_dim": 8, "n_embed": 128, "depth": 2},
            },
            "gen_head_config": {
                "cls": "vision_head",
                "params": {"image_token_embed": 128, "image_token_size": 64, "n_embed": 128},
            },
        },
        splits={r"vision_tower\..*\.qkv_proj": ()},
        names=((r"^(vision_model\..*)\.attn\.qkv_proj\.", r"\1.attn.qkv."),),
        lacks=r"^gen_",
    ),
    "MuseGlimmerForCausalLM": Published(
        "sglang/srt/models/muse_glimmer.py",
        {
            **DENSE,
            "model_type": "muse_glimmer",
            "layer_types": ["sliding_attention", "full_attention"],
            "no_rope_layers": [1, 0],
            "sliding_window": 64,
        },
    ),
    "MuseSparkForConditionalGeneration": Published(
        "sglang/srt/models/muse_spark_omni.py, muse_spark.py",
        {
            "model_type": "muse_spark",
            "text_config": {
                **DENSE,
                "layer_types": ["sliding_attention", "full_attention"],
                "mlp_layer_types": ["dense", "sparse"],
                "sliding_window": 64,
                "moe_hidden_size": 64,
                "moe_intermediate_size": 96,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
            },
            "vision_config": {
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "pos_emb_height": 8,
                "pos_emb_width": 8,
                "layer_types": ["window_attention", "full_attention"],
            },
            "audio_config": {
                "depths": [1, 1],
                "hidden_sizes": [32, 64],
                "patch_sizes": [16, 6],
                "num_hidden_layers": 2,
                "out_hidden_size": 128,
            },
            "out_hidden_size": 512,
            "projector_hidden_size": 192,
        },
        splits={r"self_attn\.qkv_proj": (("q_proj", 128), ("k_proj", 64), ("v_proj", 64), ("gate_proj", 128))},
        gpu="h200",
    ),
    "NemotronH_Nano_Omni_Reasoning_V3": replace(
        _NEMOTRON_V2,
        source="sglang/srt/models/nano_nemotron_vl.py, parakeet.py",
        config={**_NEMOTRON_VL, "model_type": "NemotronH_Nano_Omni_Reasoning_V3", "sound_config": _PARAKEET},
    ),
    "NemotronH_Nano_VL_V2": _NEMOTRON_V2,
    "NemotronH_Omni_Reasoning_V3": replace(
        _NEMOTRON_V2,
        source="sglang/srt/models/nano_nemotron_vl.py, radio.py",
        config={
            **_NEMOTRON_VL,
            "model_type": "nemotron_h_omni",
            "llm_config": {**_NEMOTRON, "num_nextn_predict_layers": 1},
            "vision_config": {**_RADIO, "video_temporal_patch_size": 2},
        },
        splits={r"vision_model\..*\.qkv_proj": ("query", "key", "value")},
        names=(
            *_NEMOTRON_NAMES,
            (r"^vision_model\.model\.patch_generator\.", "vision_model.embeddings."),
            (r"\.cls_token\.token$", ".cls_register_token"),
            (r"\.embeddings\.video_embedder\.", ".embeddings.video_patch_projection."),
            (r"\.embeddings\.embedder\.", ".embeddings.patch_projection."),
            (r"\.embeddings\.pos_embed$", ".embeddings.position_embedding"),
            (r"^vision_model\.model\.encoder\.layers\.", "vision_model.encoder.layer."),
            (r"\.attn\.attn\.(?=query|key|value)", ".attention.attention."),
            (r"\.attn\.attn\.proj\.", ".attention.output.dense."),
            (r"^mlp1\.0\.", "vision_projector.mlp1.norm."),
            (r"^mlp1\.1\.", "vision_projector.mlp1.linear1."),
            (r"^mlp1\.3\.", "vision_projector.mlp1.linear2."),
            (r"^vision_final_layernorm\.", "vision_projector.vision_final_layernorm."),
        ),
    ),
    "NVILAForConditionalGeneration": _NVILA,
    "NVILALiteForConditionalGeneration": replace(_NVILA, source="sglang/srt/models/nvila_lite.py"),
    "Phi4MMForCausalLM": Published(
        "https://huggingface.co/microsoft/Phi-4-multimodal-instruct, phi4mm.py",
        {
            **DENSE,
            "tie_word_embeddings": True,
            "embd_layer": {"audio_embd_layer": {"embedding_cls": "audio", "projection_cls": "mlp"}},
            "audio_processor": {
                "name": "cascades",
                "config": {
                    "activation": "swish",
                    "attention_dim": 128,
                    "attention_heads": 4,
                    "bias_in_glu": True,
                    "causal": True,
                    "chunk_size": -1,
                    "cnn_layer_norm": True,
                    "conv_activation": "swish",
                    "conv_glu_type": "swish",
                    "depthwise_seperable_out_channel": 128,
                    "encoder_embedding_config": {"input_size": 80},
                    "ext_pw_kernel_size": 1,
                    "ext_pw_out_channel": 128,
                    "input_size": 80,
                    "kernel_size": 3,
                    "left_chunk": 18,
                    "linear_units": 192,
                    "nemo_conv_settings": {"conv_channels": 128},
                    "num_blocks": 2,
                    "relative_attention_bias_args": {"t5_bias_max_distance": 500, "type": "t5"},
                    "time_reduction": 8,
                },
            },
        },
        splits={r"language_model\..*_proj": ()},
        names=(
            (r"^(language_model\..*_proj)\.", r"\1.base_layer."),
            (r"^language_model\.", ""),
            (r"^vision_encoder\.", "model.embed_tokens_extend.image_embed."),
            (r"(img_processor\..*\.self_attn)\.proj\.", r"\1.out_proj."),
            (
                r"^embed_tokens_extend\.audio_projection_for_vision\.",
                "model.embed_tokens_extend.audio_embed.audio_projection.vision.",
            ),
            (
                r"^embed_tokens_extend\.audio_projection\.",
                "model.embed_tokens_extend.audio_embed.audio_projection.speech.",
            ),
            (r"^embed_tokens_extend\.", "model.embed_tokens_extend.audio_embed."),
        ),
    ),
    "PixtralForConditionalGeneration": Published(
        "https://huggingface.co/mistralai/Pixtral-12B-2409, pixtral.py, mistral.py",
        {
            "text_config": {**DENSE, "model_type": "mistral"},
            "vision_config": {
                **_SIGLIP,
                "model_type": "pixtral",
                "rope_theta": 10000.0,
                "image_token_id": 10,
                "adapter_bias": True,
            },
        },
        names=(
            (r"^language_model\.model\.embed_tokens\.", "tok_embeddings."),
            (r"^language_model\.lm_head\.", "output."),
            (r"^language_model\.model\.", ""),
            (r"(?<=\d)\.input_layernorm\.", ".attention_norm."),
            (r"(?<=\d)\.post_attention_layernorm\.", ".ffn_norm."),
            (r"\.self_attn\.([qkvo])_proj\.", r".attention.w\1."),
            (r"\.mlp\.gate_proj\.", ".feed_forward.w1."),
            (r"\.mlp\.down_proj\.", ".feed_forward.w2."),
            (r"\.mlp\.up_proj\.", ".feed_forward.w3."),
        ),
    ),
    "POINTSV15ChatModel": Published(
        "https://huggingface.co/WePOINTS/POINTS-1-5-Qwen-2-5-7B-Chat, points_v15_chat.py",
        {
            "model_type": "pointsv1.5_chat",
            "auto_map": {"AutoConfig": "configuration_tiny.Nested"},
            "llm_config": _QWEN2,
            "vision_config": _QWEN2_VISION,
        },
        splits={r"vision_encoder\..*\.qkv_proj": ()},
        names=((r"^(vision_encoder\..*)\.attn\.qkv_proj\.", r"\1.attn.qkv."),),
    ),
    "Qwen2AudioForConditionalGeneration": Published(
        "https://huggingface.co/Qwen/Qwen2-Audio-7B-Instruct, qwen2_audio.py",
        of_transformers("Qwen2AudioForConditionalGeneration"),
    ),
    "Qwen3ASRForConditionalGeneration": Published(
        "https://huggingface.co/Qwen/Qwen3-ASR-1.7B, qwen3_asr.py",
        {
            "model_type": "qwen3_asr",
            "thinker_config": {
                "text_config": _QWEN3,
                "audio_config": {
                    "d_model": 128,
                    "encoder_layers": 2,
                    "encoder_attention_heads": 4,
                    "encoder_ffn_dim": 256,
                    "num_mel_bins": 16,
                    "max_source_positions": 32,
                    "downsample_hidden_size": 32,
                    "output_dim": 128,
                },
            },
        },
        names=(
            (r"^audio_tower\.(.*)\.self_attn\.proj\.", r"audio_tower.\1.self_attn.out_proj."),
            (r"^(language_model\.)?", "thinker."),
        ),
    ),
    "Sarashina2VisionForCausalLM": Published(
        "https://huggingface.co/sbintuitions/sarashina2-vision-8b, sarashina2_vision.py",
        {"text_config": LLAMA, "vision_config": _QWEN2_VISION, "vocab_size": 512, "hidden_size": 128},
        splits={r"visual\..*\.qkv_proj": ()},
        names=((r"^(visual\..*)\.attn\.qkv_proj\.", r"\1.attn.qkv."),),
    ),
    "Step3p7ForConditionalGeneration": Published(
        "sglang/srt/models/step3p7.py, step3p5.py, conversion_mapping.py of transformers",
        {
            "model_type": "step3p7",
            "vision_config": _PERCEPTION,
            "text_config": {
                **DENSE,
                "num_attention_groups": 2,
                "layer_types": ["sliding_attention", "full_attention"],
                "attention_other_setting": {"num_attention_heads": 4, "num_attention_groups": 2},
                "sliding_window": 64,
                "rope_theta": [10000.0, 10000.0],
                "partial_rotary_factors": [1.0, 0.5],
                "use_head_wise_attn_gate": True,
                "moe_layers_enum": "1",
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "moe_intermediate_size": 96,
                "share_expert_dims": 192,
                "swiglu_limits": [0, 0],
                "swiglu_limits_shared": [0, 0],
                "need_fp32_gate": True,
                "use_moe_router_bias": True,
                "moe_router_scaling_factor": 1.0,
            },
        },
        splits={r"attn\.qkv_proj": ()},
        names=_PERCEPTION_NAMES,
        experts=(),
        adjust=_stacked_experts,
    ),
    "Step3VLForConditionalGeneration": Published(
        "https://huggingface.co/stepfun-ai/step3, step3_vl.py",
        {
            "model_type": "step3_vl",
            "text_config": {
                **DENSE,
                "share_q_dim": 64,
                "moe_layers_enum": "1",
                "moe_num_experts": 4,
                "moe_top_k": 2,
                "moe_intermediate_size": 96,
                "share_expert_dim": 192,
            },
            "vision_config": {**_SIGLIP, "hidden_act": "quick_gelu", "output_hidden_size": 64},
            "understand_projector_stride": 2,
            "projector_bias": False,
        },
        splits={r"vision_model\..*\.qkv_proj": ()},
        names=(
            (r"^vision_model\..*\.self_attn\.out_proj\..*", ""),
            (r"\.self_attn\.attn\.proj\.", ".self_attn.out_proj."),
            (r"\.self_attn\.attn\.", ".self_attn."),
        ),
        experts=(),
        adjust=_stacked_experts,
        lacks=r"^vision_model\..*\.self_attn\.out_proj\.",
    ),
    "StepVLForConditionalGeneration": Published(
        "https://huggingface.co/stepfun-ai/Step3-VL-10B, step3_vl_10b.py",
        {
            "text_config": {**_QWEN3, "attention_bias": False},
            "vision_config": _PERCEPTION,
            "projector_bias": False,
        },
        splits={r"attn\.qkv_proj": ()},
        names=_PERCEPTION_NAMES,
    ),
    "UnlimitedOCRForCausalLM": Published(
        "sglang/srt/models/unlimited_ocr.py",
        {
            "model_type": "unlimited-ocr",
            "tile_tag": "2D",
            "projector_config": {"projector_type": "linear", "input_dim": 2048, "n_embed": 128},
            "vision_config": {},
            "language_config": {
                **DENSE,
                **EXPERTS,
                "num_key_value_heads": 4,
                "topk_method": "greedy",
                "use_mla": False,
            },
        },
        names=(
            (r"^(?=sam_model\.|vision_model\.|projector\.|image_newline$|view_seperator$)", "model."),
            (r"^model\.model\.", "model."),
            (r"^model\.lm_head\.", "lm_head."),
        ),
    ),
    "VoxtralForConditionalGeneration": Published(
        "https://huggingface.co/mistralai/Voxtral-Mini-3B-2507, voxtral.py",
        of_transformers("VoxtralForConditionalGeneration"),
        names=(
            (r"^multi_modal_projector\.w_in\.", "multi_modal_projector.linear_1."),
            (r"^multi_modal_projector\.w_out\.", "multi_modal_projector.linear_2."),
            (r"^audio_tower\..*\.k_proj\.bias$", ""),
        ),
    ),
    "YiVLForCausalLM": replace(
        _LLAVA_LLAMA,
        source="https://huggingface.co/01-ai/Yi-VL-6B, yivl.py",
        config={**_LLAVA, "mm_vision_tower": "./clip/CLIPVisionModel", "mm_patch_merge_type": "flat"},
        names=(
            (r"^multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
            (r"^multi_modal_projector\.ln_1\.", "model.mm_projector.1."),
            (r"^multi_modal_projector\.linear_2\.", "model.mm_projector.3."),
            (r"^multi_modal_projector\.ln_2\.", "model.mm_projector.4."),
            (r"^language_model\.", ""),
        ),
    ),
}
