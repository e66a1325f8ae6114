"""Language models with experts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from workbench.quality.families import Config
from workbench.quality.published import Published, Tensors, of_transformers
from workbench.quality.sizes import DENSE, EXPERTS, LLAMA, MIMO_V2, MLA

_MOE: Config = {**LLAMA, **EXPERTS}
_ALL_SPARSE: Config = {**_MOE, "mlp_only_layers": [], "first_k_dense_replace": 0}
_SIGMOID: Config = {
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
_BAILING: Config = {
    **_MOE,
    "use_bias": False,
    "use_qkv_bias": False,
    "embedding_dropout": 0.0,
    "norm_head": False,
}
_BAILING_2: Config = {
    **_BAILING,
    "use_qk_norm": True,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "router_dtype": "fp32",
}
_SPARSE: Config = {"index_n_heads": 4, "index_head_dim": 64, "index_topk": 64}
_GROK: Config = {**_ALL_SPARSE, "embedding_multiplier_scale": 78.38, "output_multiplier_scale": 0.577}

_W123 = ("w1", "w3", "w2")
_AS_W123 = ((r"\.gate_proj\.", ".w1."), (r"\.down_proj\.", ".w2."), (r"\.up_proj\.", ".w3."))
_INDEXER = {"wk_weights_proj": (("wk", 64), ("weights_proj", 4))}


def _named_shared(*experts: str) -> tuple[tuple[str, str], ...]:
    """The shared expert, where SGLang appends it to the four others, whose projections are called `experts`."""
    published = ("gate_proj", "up_proj", "down_proj")
    return tuple(
        (rf"\.experts\.4\.{expert}\.", f".shared_experts.{name}.")
        for expert, name in zip(experts, published, strict=True)
    )


def _dbrx(tensors: Tensors) -> Tensors:
    """Experts as DBRX stores them: all of a layer's, below one another, and the last projection transposed."""
    layout: Tensors = {}
    for name, (shape, dtype) in tensors.items():
        owner, _, leaf = name.rpartition(".")
        if leaf not in ("ws", "w2s"):
            layout[name] = (shape, dtype)
            continue
        count, width, hidden = (shape[0], shape[1] // 2, shape[2]) if leaf == "ws" else (shape[0], shape[2], shape[1])
        for part in ("w1", "v1") if leaf == "ws" else ("w2",):
            layout[f"{owner}.experts.mlp.{part}"] = ((count * width, hidden), dtype)
    return layout


def _flat_decays(tensors: Tensors) -> Tensors:
    """The decays of delta attention without the dimensions that SGLang adds to them."""
    return {
        name: ((math.prod(shape),), dtype) if name.endswith(".A_log") else (shape, dtype)
        for name, (shape, dtype) in tensors.items()
    }


def _one_by_one(names: Mapping[str, str], tensors: Tensors) -> Tensors:
    """Stacks that end in one of these names as tensors of their own; ``{}`` is the number in the stack."""
    layout: Tensors = {}
    for name, (shape, dtype) in tensors.items():
        end = next((end for end in names if name.endswith(end)), "")
        if not end:
            layout[name] = (shape, dtype)
            continue
        for number in range(shape[0]):
            layout[name.removesuffix(end) + names[end].format(number)] = (shape[1:], dtype)
    return layout


def _halved(tensors: Tensors) -> Tensors:
    """The two projections of DeepSeek-V4's compressors, whose sizes differ from layer to layer."""
    layout: Tensors = {}
    for name, (shape, dtype) in tensors.items():
        for part in ("wkv", "wgate") if ".wkv_gate." in name else ("",):
            layout[name.replace("wkv_gate", part)] = ((shape[0] // 2, *shape[1:]) if part else shape, dtype)
    return layout


def _stacked(tensors: Tensors) -> Tensors:
    """Experts as Step-3.5 stores them: a layer's matrices of a kind in one tensor."""
    layout: Tensors = {}
    for name, (shape, dtype) in tensors.items():
        owner, _, leaf = name.rpartition(".")
        above = owner.removesuffix(".experts")
        if leaf == "w13_weight":
            count, rows, columns = shape
            for part in ("gate_proj", "up_proj"):
                layout[f"{above}.{part}.weight"] = ((count, rows // 2, columns), dtype)
        elif leaf == "w2_weight":
            layout[f"{above}.down_proj.weight"] = (shape, dtype)
        else:
            layout[name] = (shape, dtype)
    return layout


ARCHITECTURES: dict[str, Published] = {
    "BailingMoeForCausalLM": Published(
        "https://huggingface.co/inclusionAI/Ling-lite, sglang/srt/models/bailing_moe.py", _BAILING
    ),
    "BailingMoeV2ForCausalLM": Published(
        "https://huggingface.co/inclusionAI/Ling-mini-2.0, sglang/srt/models/bailing_moe.py", _BAILING_2
    ),
    "BailingMoeV2_5ForCausalLM": Published(
        "https://huggingface.co/inclusionAI/Ring-2.5-1T, sglang/srt/models/bailing_moe_linear.py",
        {
            **_BAILING_2,
            **MLA,
            "model_type": "bailing_hybrid",
            "layer_group_size": 2,
            "group_norm_size": 2,
        },
        names=((r"\.attention\.o_proj\.", ".attention.dense."),),
        gpu="h200",
    ),
    "BailingMoeV3ForCausalLM": Published(
        "sglang/srt/models/bailing_moe_v3.py",
        {
            **_BAILING_2,
            **MLA,
            "model_type": "bailing_hybrid",
            "layer_group_size": 2,
            "short_conv_kernel_size": 4,
            "no_kda_lora": True,
        },
        names=(*_named_shared("gate_proj", "up_proj", "down_proj"), (r"\.attention\.o_proj\.", ".attention.dense.")),
        splits={
            "fused_qkvbfg_proj": ("q_proj", "k_proj", "v_proj", "b_proj", "f_proj", "g_proj"),
            "qkv_conv1d": ("q_conv1d", "k_conv1d", "v_conv1d"),
        },
        adjust=_flat_decays,
        gpu="h200",
    ),
    "DbrxForCausalLM": Published(
        "https://huggingface.co/databricks/dbrx-instruct, sglang/srt/models/dbrx.py",
        {
            "model_type": "dbrx",
            "d_model": 128,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 512,
            "vocab_size": 512,
            "attn_config": {"clip_qkv": 8, "kv_n_heads": 2, "rope_theta": 500000},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        },
        adjust=_dbrx,
        gpu="h200",
    ),
    "DeepseekForCausalLM": Published(
        "https://huggingface.co/deepseek-ai/deepseek-moe-16b-base, sglang/srt/models/deepseek.py", _MOE
    ),
    "DeepseekV4ForCausalLM": Published(
        "sglang/srt/models/deepseek_v4.py",
        {
            **_MOE,
            **MLA,
            "model_type": "deepseek_v4",
            "num_hidden_layers": 3,
            "first_k_dense_replace": 0,
            "num_key_value_heads": 1,
            "head_dim": 64,
            "qk_nope_head_dim": 48,
            "topk_method": "noaux_tc",
            "scoring_func": "sqrtsoftplus",
            "swiglu_limit": 10.0,
            "num_hash_layers": 1,
            "compress_ratios": [0, 4, 128],
            "compress_rope_theta": 160000.0,
            "sliding_window": 128,
            "o_groups": 2,
            "o_lora_rank": 64,
            **_SPARSE,
            "hc_mult": 2,
            "hc_sinkhorn_iters": 20,
            "hc_eps": 1e-6,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 128,
            },
        },
        names=(
            (r"^model\.embed_tokens\.", "embed."),
            (r"^lm_head\.", "head."),
            (r"^model\.", ""),
            (r"\.self_attn\.", ".attn."),
            (r"\.mlp\.", ".ffn."),
            (r"\.input_layernorm\.", ".attn_norm."),
            (r"\.post_attention_layernorm\.", ".ffn_norm."),
            (r"\.topk\.tid2eid$", ".gate.tid2eid"),
            (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
            *_AS_W123,
        ),
        splits={"wqkv_a": (("wq_a", 64), ("wkv", 64))},
        adjust=_halved,
        # As published, its experts are FP4, and loading ends with compiling kernels, which there are for real sizes.
        environ={"SGLANG_DSV4_FP4_EXPERTS": "0", "SGLANG_OPT_USE_TILELANG_MHC_PRE": "0"},
        gpu="h200",
    ),
    "Dots3NoteForCausalLM": Published(
        "sglang/srt/models/dots3_common/modeling.py",
        {
            **_MOE,
            **MLA,
            **_SIGMOID,
            "model_type": "dots3_note",
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window_size": 128,
            **_SPARSE,
            **{f"swa_{key}": value for key, value in MLA.items()},
            **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 8),
            **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads"), 8),
        },
        names=((r"^thinker\.language_model\.", ""),),
        splits={
            **_INDEXER,
            "fused_qkv_a_g_proj_with_mqa": (("q_a_proj", 64), ("kv_a_proj_with_mqa", 80), ("g_proj", 8)),
        },
        server_args={"language_only": True},
        gpu="h200",
    ),
    "ExaoneMoEForCausalLM": Published(
        "https://huggingface.co/LGAI-EXAONE/K-EXAONE-236B-A23B, sglang/srt/models/exaone_moe.py",
        of_transformers("ExaoneMoeForCausalLM"),
        server_args={"attention_backend": "triton"},
    ),
    "GigaChat35ForCausalLM": Published(
        "sglang/srt/models/gigachat35.py",
        {
            **_MOE,
            **MLA,
            **_SIGMOID,
            "model_type": "gigachat3_5",
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
        },
        names=(
            (r"\.gate_up_lowrank\.", ".gate_up_projection."),
            (r"\.gate_down_lowrank\.", ".gate_down_projection."),
            (r"\.attn_gate\.", ".gate_proj."),
        ),
        gpu="h200",
    ),
    "Grok1ForCausalLM": Published(
        "https://huggingface.co/xai-org/grok-2, sglang/srt/models/grok.py",
        {**_GROK, "residual_moe": True},
        experts=_W123,
    ),
    "HYV4ForCausalLM": Published(
        "sglang/srt/models/hunyuan_v4.py",
        {
            **_MOE,
            **MLA,
            "model_type": "hy_v4",
            "num_nextn_predict_layers": 0,
            **_SPARSE,
            "hc_mult": 2,
        },
        names=((r"\.(hc_fn|hc_head_fn)\.weight$", r".\1"),),
        splits=_INDEXER,
        gpu="h200",
    ),
    "K2HorizonForCausalLM": Published(
        "sglang/srt/models/xllm.py",
        {
            **_MOE,
            "model_type": "k2_horizon",
            "attention_gate_func": "silu",
            "mova_num_experts": 4,
            "mova_num_experts_per_tok": 2,
            "xllm_source_router_gemm_partitions": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "moe_gate_bias": True,
            "router_scaling_factor": 1.0,
        },
        adjust=partial(_one_by_one, {"v_experts.weight": "v_experts.{}.weight"}),
    ),
    "LLaDA2MoeModelLM": Published(
        "https://huggingface.co/inclusionAI/LLaDA2.0-mini-preview, sglang/srt/models/llada2.py", _BAILING_2
    ),
    "Llama4ForCausalLM": Published(
        # Its loader knows no experts: what is published under this name is dense.
        "https://huggingface.co/facebook/MobileLLM-R1-950M, sglang/srt/models/llama4.py",
        {
            **DENSE,
            "model_type": "llama4_text",
            "intermediate_size_mlp": 256,
            "interleave_moe_layer_step": 0,
            "moe_layers": [],
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "use_qk_norm": True,
        },
    ),
    "LongcatFlashForCausalLM": Published(
        "https://huggingface.co/meituan-longcat/LongCat-Flash-Chat, sglang/srt/models/longcat_flash.py",
        {
            **_MOE,
            **MLA,
            "model_type": "longcat_flash",
            "ffn_hidden_size": 256,
            "expert_ffn_hidden_size": 96,
            "num_layers": 2,
            "moe_topk": 2,
            "zero_expert_num": 2,
            "routed_scaling_factor": 6.0,
            "num_nextn_predict_layers": 0,
            # Without it SGLang 0.5.23 looks for ``rope_theta`` in None.
            "rope_scaling": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "MiMoV2FlashForCausalLM": Published(
        "https://huggingface.co/XiaomiMiMo/MiMo-V2-Flash, sglang/srt/models/mimo_v2.py",
        {
            **DENSE,
            **EXPERTS,
            **_SIGMOID,
            **MIMO_V2,
            "add_full_attention_sink_bias": False,
            "attention_bias": False,
            "attention_value_scale": 0.707,
            "partial_rotary_factor": 0.5,
            "layernorm_epsilon": 1e-5,
        },
    ),
    "MiniMaxM3SparseForCausalLM": Published(
        "sglang/srt/models/minimax_m3.py",
        {
            **_ALL_SPARSE,
            "num_hidden_layers": 3,
            "intermediate_size": 96,
            "dense_intermediate_size": 256,
            "moe_layer_freq": [0, 1, 1],
            "use_routing_bias": True,
            "scoring_func": "sigmoid",
            "routed_scaling_factor": 2.0,
            "hidden_act": "swigluoai",
            "swiglu_alpha": 1.702,
            "swiglu_limit": 7.0,
            "use_qk_norm": True,
            "qk_norm_type": "per_head",
            "use_gemma_norm": True,
            "rotary_dim": 16,
            "sparse_attention_config": {
                "use_sparse_attention": True,
                "sparse_num_index_heads": 2,
                "sparse_index_dim": 32,
                "sparse_block_size": 128,
                "sparse_topk_blocks": 16,
                "sparse_attention_freq": [0, 1, 1],
                "sparse_disable_index_value": [0, 0, 1],
            },
        },
        names=(
            *_named_shared("w1", "w3", "w2"),
            (r"\.mlp\.((experts|shared_experts|gate)\.|e_score)", r".block_sparse_moe.\1"),
        ),
        splits={"index_qkv_proj": ("index_q_proj", "index_k_proj", "index_v_proj")},
        experts=_W123,
        gpu="h200",
    ),
    "MistralLarge3ForCausalLM": Published(
        "https://huggingface.co/mistralai/Mistral-Large-3-675B-Base-2512, sglang/srt/models/mistral_large_3.py",
        of_transformers("DeepseekV3ForCausalLM"),
        names=(
            (r"^model\.layers\.", "layers."),
            (r"^model\.embed_tokens\.", "tok_embeddings."),
            (r"^model\.norm\.", "norm."),
            (r"^lm_head\.", "output."),
            (r"\.input_layernorm\.", ".attention_norm."),
            (r"\.post_attention_layernorm\.", ".ffn_norm."),
            (r"\.self_attn\.(q|kv)_a_layernorm\.", r".attention.\1_a_norm."),
            (r"\.self_attn\.kv_a_proj_with_mqa\.", ".attention.wkv_a_with_mqa."),
            (r"\.self_attn\.(q_a|q_b|kv_b|o)_proj\.", r".attention.w\1."),
            (r"\.mlp\.gate\.e_score_correction_bias$", ".router_biases"),
            (r"\.mlp\.(gate|experts|shared_experts)\.", r".\1."),
            (r"\.mlp\.", ".feed_forward."),
            *_AS_W123,
        ),
    ),
    "PhiMoEForCausalLM": Published(
        "https://huggingface.co/microsoft/Phi-3.5-MoE-instruct, sglang/srt/models/phimoe.py",
        {**_ALL_SPARSE, "model_type": "phimoe", "attention_bias": True, "lm_head_bias": True},
        experts=_W123,
    ),
    "QuantMixtralForCausalLM": Published(
        "https://huggingface.co/mistralai/Mixtral-8x7B-v0.1, sglang/srt/models/mixtral_quant.py",
        {**_ALL_SPARSE, "model_type": "mixtral"},
    ),
    "SDARMoeForCausalLM": Published(
        "https://huggingface.co/JetLM/SDAR-30B-A3B-Chat, sglang/srt/models/sdar_moe.py", _ALL_SPARSE
    ),
    "SarvamMLAForCausalLM": Published(
        "sglang/srt/models/sarvam_moe.py",
        {**_MOE, **MLA, "head_dim": 48, "q_lora_rank": None, "routed_scaling_factor": 2.5},
        names=((r"\.mlp\.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),),
    ),
    "SarvamMoEForCausalLM": Published("sglang/srt/models/sarvam_moe.py", _BAILING_2),
    "Step3p5ForCausalLM": Published(
        "https://huggingface.co/stepfun-ai/Step-3.5-Flash, sglang/srt/models/step3p5.py",
        {
            **DENSE,
            "model_type": "step3p5",
            # The class that transformers has for it knows no layers of different shapes.
            "auto_map": {"AutoConfig": "configuration_tiny.Nested"},
            "num_attention_groups": 2,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "moe_intermediate_size": 96,
            "share_expert_dims": 96,
            "moe_layers_enum": "1",
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 128,
            "attention_other_setting": {"num_attention_heads": 6, "num_attention_groups": 2},
            "use_head_wise_attn_gate": True,
            "use_moe_router_bias": True,
            "need_fp32_gate": True,
            "moe_router_scaling_factor": 3.0,
            "rope_theta": [5000000.0, 10000.0],
            "swiglu_limits": [0.0, 7.0],
            "swiglu_limits_shared": [0.0, 16.0],
            "partial_rotary_factors": [0.5, 1.0],
        },
        experts=(),
        adjust=_stacked,
    ),
    "XllmForCausalLM": Published("sglang/srt/models/xllm.py", {**_MOE, "model_type": "xllm", "num_shared_experts": 0}),
    "XverseMoeForCausalLM": Published(
        "https://huggingface.co/xverse/XVERSE-MoE-A4.2B, sglang/srt/models/xverse_moe.py",
        {**_ALL_SPARSE, "moe_top_k": 2, "intermediate_size": 96},
    ),
    "ZayaForCausalLM": Published(
        "https://huggingface.co/Zyphra/ZAYA1-base, sglang/srt/models/zaya.py",
        {
            "model_type": "zaya",
            "vocab_size": 512,
            "hidden_size": 128,
            "ffn_hidden_size": 192,
            "num_hidden_layers": 4,
            "num_experts": 4,
            "num_attention_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "zaya_mlp_expansion": 64,
        },
        experts=(),
        adjust=partial(
            _one_by_one,
            {
                "w13_weight": "local_experts.{}.linear_fc1.weight",
                "w2_weight": "local_experts.{}.linear_fc2.weight",
            },
        ),
    ),
}
ARCHITECTURES |= {
    "BailingMoEForCausalLM": ARCHITECTURES["BailingMoeForCausalLM"],
    "Grok1ModelForCausalLM": Published(
        "https://huggingface.co/lmzheng/grok-1, sglang/srt/models/grok.py", _GROK, experts=_W123
    ),
    # In later ones the projections of queries, keys and values are one.
    "MiMoV2ForCausalLM": replace(
        ARCHITECTURES["MiMoV2FlashForCausalLM"], source="sglang/srt/models/mimo_v2.py", splits={"qkv_proj": ()}
    ),
}
