# SPDX-License-Identifier: Apache-2.0
"""What can be streamed, judging by upstream's configuration. Every ``why_not_*`` returns a reason or None."""

from __future__ import annotations

from typing import Any

import torch

from sglang_overlay.schemes import capabilities

ABSORBED = {
    "kv_b_proj": "MLA's post_load_weights builds w_kc and w_vc from its high-precision weight before quantization",
}
"""Layers whose bf16 weight upstream reads after loading, by the last part of their name, and what reads it.

They stay in high precision, as in stock, until upstream is done with them. deepseek_v2 and its relatives have them
(deepseek_nextn, longcat_flash, bailing_moe_v3, bailing_moe_linear, kimi_linear, kimi_k25_eagle3, minicpm3, sarvam_moe,
gigachat35, dots3).
"""


def is_online_fp8(config: Any) -> bool:
    """Whether this is SGLang's own fp8 config over a high-precision checkpoint.

    Not so for subclasses and look-alikes (w4afp8, compressed-tensors, modelopt, quark, nvfp4), fp8-serialized
    checkpoints, mxfp8 and fp4 experts, which have their own rules.
    """
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    return (
        type(config) is Fp8Config
        and not config.is_checkpoint_fp8_serialized
        and not config.use_mxfp8
        and not capabilities.has_fp4_experts(config)
        and config.weight_block_size is None
    )


def why_not_platform() -> str | None:
    """Why this platform stays on stock's path: this package has never run its post-processing."""
    from sglang.srt import utils

    for name in ("is_xpu", "is_npu", "is_musa", "is_cpu"):
        if not hasattr(utils, name):
            return f"this SGLang does not tell which platform it runs on (sglang.srt.utils.{name} is not there)"
        if getattr(utils, name)():
            return f"fp8 post-processing of this platform ({name.removeprefix('is_')}) is not covered yet"
    if capabilities.packs_experts_to_int4():
        return "SGLANG_INT4_WEIGHT has experts in int4"
    return None


def why_not_options() -> str | None:
    """A server option that moves weights while the model is built."""
    from sglang.srt.utils import offloader

    if not isinstance(offloader.get_offloader(), offloader.NoopOffloader):
        return "CPU offload (--cpu-offload-gb, --offload-group-size) moves weights while the model is built"
    return None


def why_not_layer(method: Any, layer: torch.nn.Module) -> str | None:
    """A layer whose quantization method is wrapped by another (kt-ep, paged experts), which then manages the layer."""
    if getattr(layer, "quant_method", None) is not method:
        wrapper = type(getattr(layer, "quant_method", None)).__name__
        return f"its quantization method is wrapped by {wrapper}"
    return None


def shares_keys_and_values(model: Any, layer: str) -> bool:
    """Whether a layer is of an attention that takes its keys and values from another layer.

    Such a layer has rows for keys and values all the same, which nothing uses, and published checkpoints may lack them:
    ``gemma3n_causal.py``, ``gemma4_causal.py`` with ``num_kv_shared_layers``, and Gemma 4's drafts (``gemma4_mtp.py``).
    """
    attention = model.get_submodule(layer.rpartition(".")[0])
    return getattr(attention, "is_kv_shared_layer", False) or hasattr(model, "bind_frozen_kv_context")


def why_deferred(name: str) -> str | None:
    """Why a layer must stay in high precision until upstream has read it; None if it need not."""
    return ABSORBED.get(name.rsplit(".", 1)[-1])
