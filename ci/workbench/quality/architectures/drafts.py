"""Drafts of speculative decoding: MTP layers, EAGLE heads, DFlash and DSpark."""

from __future__ import annotations

from workbench.quality.published import Published, of_transformers

ARCHITECTURES: dict[str, Published] = {
    "DeepseekV3ForCausalLMNextN": Published(
        "https://huggingface.co/deepseek-ai/DeepSeek-V3, sglang/srt/models/deepseek_nextn.py",
        of_transformers("DeepseekV3ForCausalLM", num_nextn_predict_layers=1),
        named_in_config="DeepseekV3ForCausalLM",
        names=(
            (r"^model\.decoder\.", "model.layers.2."),
            (r"^model\.(?=enorm|hnorm|eh_proj|embed_tokens)", "model.layers.2."),
            (r"^model\.shared_head\.norm", "model.layers.2.shared_head.norm"),
            (r"^lm_head\.", "model.layers.2.shared_head.head."),
        ),
        lacks=r"^(model\.embed_tokens|lm_head)\.",
        beside="DeepseekV3ForCausalLM",
        is_draft=True,
    ),
}
