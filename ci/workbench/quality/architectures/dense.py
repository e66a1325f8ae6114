"""Language models without experts."""

from __future__ import annotations

from workbench.quality.published import Published
from workbench.quality.sizes import DENSE

ARCHITECTURES: dict[str, Published] = {
    "BaichuanForCausalLM": Published(
        "https://huggingface.co/baichuan-inc/Baichuan2-7B-Chat, modeling_baichuan.py",
        {**DENSE, "model_type": "llama", "num_key_value_heads": 4},
        gpu="h200",
    ),
    "InternLM2ForCausalLM": Published(
        "https://huggingface.co/internlm/internlm2-chat-7b, modeling_internlm2.py",
        {**DENSE, "model_type": "llama"},
        splits={"wqkv": (), "gate_up_proj": ("w1", "w3")},
    ),
}
