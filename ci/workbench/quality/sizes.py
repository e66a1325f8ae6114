"""Keys of configs at tiny sizes, which most language models have."""

from __future__ import annotations

from workbench.quality.families import Config

DENSE: Config = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "vocab_size": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
"""Of a model as Llama."""

EXPERTS: Config = {
    "moe_intermediate_size": 96,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}
"""What experts add, under each of the names that models have for it; the first layer is dense."""

LLAMA: Config = {**DENSE, "model_type": "llama"}
"""With the model type whose config class keeps keys that it does not know."""

MLA: Config = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}
"""What DeepSeek's attention adds."""

MIMO_V2: Config = {
    "v_head_dim": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 32,
    "swa_v_head_dim": 16,
    "swa_rope_theta": 10000.0,
    "hybrid_layer_pattern": [0, 1],
    "moe_layer_freq": [0, 1],
    "sliding_window_size": 128,
    "sliding_window": 128,
    "add_swa_attention_sink_bias": True,
}
"""What MiMo-V2 and its draft have beside experts."""

INKLING: Config = {
    **DENSE,
    "intermediate_size": 96,
    "dense_intermediate_size": 256,
    "d_rel": 16,
    "rel_extent": 64,
    "local_layer_ids": [0],
    "sliding_window_size": 64,
    "use_sconv": True,
    "use_embed_norm": True,
    "dense_mlp_idx": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}
"""The text part of Inkling and of its draft."""
