"""Language models with linear attention, state spaces or sparse attention beside, or in place of, attention."""

from __future__ import annotations

import re

from workbench.quality.families import Config
from workbench.quality.published import Published, Tensors, of_transformers
from workbench.quality.sizes import DENSE

_KDA: Config = {
    "kda_layers": [1],
    "full_attn_layers": [2],
    "num_heads": 4,
    "head_dim": 32,
    "short_conv_kernel_size": 4,
}
"""Kimi's linear attention: the first layer has it; layers are counted from 1."""

_KIMI: Config = {
    **DENSE,
    "model_type": "kimi_linear",
    "num_key_value_heads": 4,
    "linear_attn_config": _KDA,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "moe_intermediate_size": 96,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "num_shared_experts": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "mla_use_nope": True,
}


def _gates_one_by_one(tensors: Tensors) -> Tensors:
    """The gates' second projections, which SGLang keeps as a batch of two."""
    return {
        name: (shape[1:] if re.search(r"\.[fg]_b_proj\.", name) and len(shape) == 3 else shape, dtype)
        for name, (shape, dtype) in tensors.items()
    }


def _decay_of_each_head(tensors: Tensors) -> Tensors:
    """``A_log`` as one value for each head."""
    return {name: (shape[2:3] if name.endswith(".A_log") else shape, dtype) for name, (shape, dtype) in tensors.items()}


ARCHITECTURES: dict[str, Published] = {
    "JetNemotronForCausalLM": Published(
        "https://huggingface.co/jet-ai/Jet-Nemotron-2B, modeling_jet_nemotron.py",
        {
            **DENSE,
            "model_type": "jet_nemotron",
            "tie_word_embeddings": True,
            "num_hidden_layers": 3,
            "layer_types": ["jet", "attn", "swa"],
            "efficient_attention_config": {
                "jet": {
                    "mode": "chunk",
                    "expand_v": 2.0,
                    "num_heads": 4,
                    "head_dim": 16,
                    "norm_eps": "1e-5",
                    "conv_size": 4,
                    "dconv_generator_reduction": 8,
                    "dconv_implementation": "triton",
                },
                "swa": {"window_size": 64},
            },
        },
        splits={"qkvabz_proj": ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj")},
    ),
    "KimiK3LinearForCausalLM": Published(
        "sglang/srt/models/kimi_k3.py",
        {
            **_KIMI,
            "hidden_act": "situ",
            "activation_situ_beta": 4.0,
            "activation_situ_linear_beta": 25.0,
            "linear_attn_config": {**_KDA, "use_full_rank_gate": True, "gate_lower_bound": -5.0},
            "attn_res_block_size": 2,
            "q_lora_rank": 64,
            "mla_use_output_gate": True,
            "routed_expert_hidden_size": 64,
            "latent_moe_use_norm": True,
        },
        # After loading, the weight has a second name, which comes first.
        names=((r"\._bfa_f_b_w$", ".f_b_proj.weight"),),
        splits={
            "fused_qkvg_proj": ("q_proj", "k_proj", "v_proj", "g_proj"),
            "qkv_conv1d": ("q_conv1d", "k_conv1d", "v_conv1d"),
        },
        experts=("w1", "w3", "w2"),
        adjust=_decay_of_each_head,
        gpu="h200",
    ),
    "KimiLinearForCausalLM": Published(
        "https://huggingface.co/moonshotai/Kimi-Linear-48B-A3B-Instruct, modeling_kimi.py",
        _KIMI,
        splits={
            "fused_qkvbfg_a_proj": (
                ("q_proj", 128),
                ("k_proj", 128),
                ("v_proj", 128),
                ("b_proj", 4),
                ("f_a_proj", 32),
                ("g_a_proj", 32),
            ),
            "fused_fg_b_proj": (("f_b_proj", 1), ("g_b_proj", 1)),
            "qkv_conv1d": ("q_conv1d", "k_conv1d", "v_conv1d"),
        },
        experts=("w1", "w3", "w2"),
        adjust=_gates_one_by_one,
    ),
    "MiniCPMSALAForCausalLM": Published(
        "https://huggingface.co/openbmb/MiniCPM-SALA, sglang/srt/configs/minicpm.py",
        {
            **DENSE,
            "model_type": "minicpm_sala",
            "scale_emb": 12,
            "dim_model_base": 128,
            "scale_depth": 1.4,
            "mixer_types": ["minicpm4", "lightning-attn"],
            "lightning_nh": 4,
            "lightning_nkv": 4,
            "lightning_head_dim": 32,
            "use_output_gate": True,
            "use_output_norm": True,
            "attn_use_output_gate": True,
            "attn_use_rope": False,
        },
    ),
    "NemotronHPuzzleForCausalLM": Published(
        "sglang/srt/configs/nemotron_h.py",
        of_transformers(
            "NemotronHForCausalLM",
            model_type="nemotron_h_puzzle",
            block_configs=[
                {"block_type": "mamba"},
                {"block_type": "moe", "n_routed_experts": 4, "moe_intermediate_size": 96, "num_experts_per_tok": 2},
                {"block_type": "attention"},
                {"block_type": "moe", "n_routed_experts": 2, "moe_intermediate_size": 64, "num_experts_per_tok": 1},
            ],
            hybrid_override_pattern="ME*E",
            layers_block_type=["mamba", "moe", "attention", "moe"],
        ),
        names=((r"^model\.", "backbone."), (r"embed_tokens", "embeddings"), (r"\.A$", ".A_log")),
    ),
}
