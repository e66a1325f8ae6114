"""Language models without experts."""

from __future__ import annotations

from workbench.quality.families import Config
from workbench.quality.published import Published, of_transformers
from workbench.quality.sizes import DENSE, EXPERTS

_LLAMA: Config = {**DENSE, "model_type": "llama"}
"""For a published config that SGLang and ``transformers`` do not know: Llama's keeps unknown keys."""

_PHI3_SMALL: Config = {
    **_LLAMA,
    "hidden_act": "gegelu",
    "gegelu_limit": 20.0,
    "layer_norm_epsilon": 1e-5,
    "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0,
    "mup_use_scaling": True,
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_width_multiplier": 8.0,
    "blocksparse_block_size": 64,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_triton_kernel_block_size": 64,
    "blocksparse_vert_stride": 8,
    "dense_attention_every_n_layers": 2,
    "dummy_token_indices": [510, 511],
    "tie_word_embeddings": True,
}

_TORCH_NATIVE_SKIPS = "."
"""``load_weights`` of SGLang 0.5.23 looks for parameters of the model itself, not of its modules, and finds none."""

ARCHITECTURES: dict[str, Published] = {
    "BaichuanForCausalLM": Published(
        "https://huggingface.co/baichuan-inc/Baichuan2-7B-Chat, modeling_baichuan.py",
        {**_LLAMA, "num_key_value_heads": 4},
        gpu="h200",
    ),
    "BeamForCausalLM": Published(
        "sglang/srt/models/beam.py",
        {
            **DENSE,
            **EXPERTS,
            "model_type": "beam",
            "num_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "layer_types": ["sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense", "sparse"],
        },
        splits={"qkv_gate_proj": ("q_proj", "k_proj", "v_proj", "gate_proj")},
    ),
    "ChatGLMModel": Published(
        "https://huggingface.co/THUDM/chatglm3-6b, modeling_chatglm.py",
        {
            "model_type": "chatglm",
            "num_layers": 2,
            "padded_vocab_size": 512,
            "hidden_size": 128,
            "ffn_hidden_size": 256,
            "kv_channels": 32,
            "num_attention_heads": 4,
            "multi_query_attention": True,
            "multi_query_group_num": 2,
            "add_qkv_bias": True,
        },
        names=((r"\.embedding\.", ".embedding.word_embeddings."),),
    ),
    "DeciLMForCausalLM": Published(
        "https://huggingface.co/nvidia/Llama-3_3-Nemotron-Super-49B-v1, modeling_decilm.py",
        {
            **DENSE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "block_configs": [
                {"attention": {"n_heads_in_group": 2, "no_op": False}, "ffn": {"ffn_mult": 3.0, "no_op": False}},
                {"attention": {"n_heads_in_group": None, "no_op": True}, "ffn": {"ffn_mult": 1.5, "no_op": False}},
            ],
        },
    ),
    "Ernie4_5_ForCausalLM": Published(
        "https://huggingface.co/baidu/ERNIE-4.5-0.3B-PT, modeling_ernie4_5.py",
        of_transformers("Ernie4_5ForCausalLM"),
    ),
    "ExaoneForCausalLM": Published(
        "https://huggingface.co/LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct, modeling_exaone.py",
        {**DENSE, "model_type": "exaone", "num_layers": 2, "activation_function": "silu", "layer_norm_epsilon": 1e-5},
        names=((r"\.self_attn\.", ".attn.attention."),),
        splits={"gate_up_proj": ("c_fc_0", "c_fc_1")},
    ),
    "InternLM2ForCausalLM": Published(
        "https://huggingface.co/internlm/internlm2-chat-7b, modeling_internlm2.py",
        _LLAMA,
        splits={"wqkv": (), "gate_up_proj": ("w1", "w3")},
    ),
    "InternLM3ForCausalLM": Published(
        "https://huggingface.co/internlm/internlm3-8b-instruct, modeling_internlm3.py", _LLAMA
    ),
    "IQuestCoderForCausalLM": Published(
        "https://huggingface.co/IQuestLab/IQuest-Coder-V1-40B-Instruct, sglang/srt/models/llama.py", _LLAMA
    ),
    "IQuestLoopCoderForCausalLM": Published(
        "https://huggingface.co/IQuestLab/IQuest-Coder-V1-40B-Loop-Instruct, sglang/srt/models/iquest_loopcoder.py",
        {**_LLAMA, "loop_num": 2, "loop_window_size": 64},
        names=((r"(gate_projections\.\d+)\.gate_proj", r"\1"),),
        # SGLang strips no prefix of these names, and skips them.
        lacks=r"^model\.gate_projections\.",
    ),
    "IQuestQ1ForCausalLM": Published(
        "sglang/srt/models/iquest_q1.py",
        {
            **DENSE,
            "model_type": "iquest_q1",
            "num_hidden_layers": 3,
            "dense_intermediate_size": 256,
            "intermediate_size": 96,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "rotary_dim": 16,
            "first_layers_types": ["full_attention"],
            "hybrid_layers_types_block": ["sliding_attention", "full_attention"],
            "num_hybrid_layers_block": 1,
            "last_layers_types": [],
        },
        names=(
            (r"experts\.w13_weight$", "experts.fc"),
            (r"experts\.w2_weight$", "experts.proj"),
            (r"\.mlp\.gate\.", ".mlp.router."),
        ),
        experts=(),
        server_args={"attention_backend": "fa3"},
        gpu="h200",
    ),
    "MiMoForCausalLM": Published(
        "https://huggingface.co/XiaomiMiMo/MiMo-7B-RL, modeling_mimo.py", {**_LLAMA, "num_nextn_predict_layers": 0}
    ),
    "MindSporeForCausalLM": Published("sglang/srt/models/mindspore.py", _LLAMA),
    "MiniCPMForCausalLM": Published(
        "https://huggingface.co/openbmb/MiniCPM-2B-sft-bf16, modeling_minicpm.py",
        {**_LLAMA, "scale_emb": 12, "dim_model_base": 128, "scale_depth": 1.4, "tie_word_embeddings": True},
    ),
    "NanbeigeForCausalLM": Published(
        "sglang/srt/models/nanbeige.py", {**DENSE, "model_type": "nanbeige", "num_loops": 2}
    ),
    "NanbeigeForSequenceClassification": Published(
        "sglang/srt/models/nanbeige.py", {**DENSE, "model_type": "nanbeige", "num_loops": 2}
    ),
    "OrionForCausalLM": Published("https://huggingface.co/OrionStarAI/Orion-14B-Chat, modeling_orion.py", _LLAMA),
    "Phi3SmallForCausalLM": Published(
        "https://huggingface.co/microsoft/Phi-3-small-8k-instruct, modeling_phi3_small.py", _PHI3_SMALL
    ),
    "QWenLMHeadModel": Published(
        "https://huggingface.co/Qwen/Qwen-7B-Chat, modeling_qwen.py",
        {**DENSE, "intermediate_size": 512, "layer_norm_epsilon": 1e-6, "kv_channels": 32, "seq_length": 512},
        splits={"gate_up_proj": ("w2", "w1")},
    ),
    "SDARForCausalLM": Published("https://huggingface.co/JetLM/SDAR-1.7B-Chat, modeling_sdar.py", _LLAMA),
    "SolarForCausalLM": Published(
        "https://huggingface.co/upstage/solar-pro-preview-instruct, modeling_solar.py",
        {**_LLAMA, "bskcn_1": [], "bskcn_2": [], "bskcn_3": [], "bskcn_4": [], "bskcn_tv": [0.9, 0.8]},
    ),
    "Spark2_5ForCausalLM": Published(
        "sglang/srt/models/spark2_5.py",
        {**DENSE, "model_type": "spark2_5", "layer_types": ["sliding_attention", "full_attention"]},
        names=((r"^model\.embed_tokens\.", "model.embedding."),),
    ),
    "TeleFLMForCausalLM": Published(
        "https://huggingface.co/CofeAI/Tele-FLM, sglang/srt/models/teleflm.py",
        {
            **_LLAMA,
            "num_key_value_heads": 4,
            "use_mup": True,
            "input_mult": 1.0,
            "output_mult": 1.0,
            "mup_scale_factor": 16.0,
        },
    ),
    "TorchNativeLlamaForCausalLM": Published(
        "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct, sglang/srt/models/torch_native_llama.py",
        _LLAMA,
        splits={
            "qkv_proj": (("q_proj", 128), ("k_proj", 64), ("v_proj", 64)),
            "gate_up_proj": (("gate_proj", 256), ("up_proj", 256)),
        },
        lacks=_TORCH_NATIVE_SKIPS,
    ),
    "TorchNativePhi3ForCausalLM": Published(
        "https://huggingface.co/microsoft/Phi-3-mini-4k-instruct, sglang/srt/models/torch_native_llama.py",
        _LLAMA,
        splits={"qkv_proj": (), "gate_up_proj": ()},
        lacks=_TORCH_NATIVE_SKIPS,
    ),
    "XverseForCausalLM": Published("https://huggingface.co/xverse/XVERSE-7B-Chat, modeling_xverse.py", _LLAMA),
}
