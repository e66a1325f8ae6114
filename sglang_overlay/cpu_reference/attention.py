# SPDX-License-Identifier: Apache-2.0
"""MLA attention by SGLang's absorbed form in every phase."""

from __future__ import annotations

from types import ModuleType
from typing import Any

MLA_HANDLERS = "sglang.srt.models.deepseek_common.attention_backend_handler"


def select_absorbed_mla(handlers: ModuleType) -> None:
    """Register the absorbed form for ``torch_native`` attention with SGLang's own registry of MLA forward methods.

    Called when SGLang has imported that registry, whose module is given.

    In the absorbed form the query is projected into the latent space, and attention runs over the KV pool's latent rows
    as one key head of ``kv_lora_rank + qk_rope_head_dim`` shared by all query heads, which ``torch_native`` computes
    correctly. Unregistered backends get Triton's choice: for prefill the expanded form, whose keys and values reach the
    backend without being stored, while ``torch_native`` reads only what is stored.
    """
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    def absorbed(attention: Any, forward_batch: Any) -> AttnForwardMethod:  # noqa: ARG001 (SGLang's handler signature)
        return AttnForwardMethod.MLA

    handlers.AttentionBackendRegistry.register("torch_native", absorbed)
