# SPDX-License-Identifier: Apache-2.0
"""Which of upstream's loaders are streamed. Every ``why_not_*`` returns a reason or None."""

from __future__ import annotations

from typing import Any

STREAMED_LOADERS = (
    "DefaultModelLoader",
    "DummyModelLoader",
    "PreshardedModelLoader",
    "RunaiModelStreamerLoader",
    "ShardedStateLoader",
)
"""Loader classes of upstream's ``loader.py`` whose way of filling parameters is supported.

Not every release has all of them.
"""


def why_not_loader(loader: Any) -> str | None:
    """Loaders that fill parameters in another way (layer by layer, quantized RL) stay on stock's path."""
    from sglang.srt.environ import envs
    from sglang.srt.model_loader import loader as upstream

    name = type(loader).__name__
    if type(loader) not in [getattr(upstream, streamed, None) for streamed in STREAMED_LOADERS]:
        return f"loading with {name} is not covered yet"
    if type(loader) is upstream.DummyModelLoader and envs.SGLANG_CPU_QUANTIZATION.get():
        return "SGLANG_CPU_QUANTIZATION builds the model on the CPU, whose arithmetic is not the device's"
    return None


def updates_itself(loader: Any) -> bool:
    """Whether a loader itself quantizes weights again when they are updated (``flash_rl``)."""
    from sglang.srt.model_loader import loader as upstream

    is_own = getattr(type(loader), "rebinding_and_load_weights", None) is not None
    return is_own and isinstance(loader, upstream.DefaultModelLoader)


def why_not_schemes(loader: Any) -> str | None:
    """Loaders of weights of which nothing says how they were quantized can serve only stock's scheme."""
    name = type(loader).__name__
    if name not in ("DefaultModelLoader", "DummyModelLoader", "PreshardedModelLoader", "RunaiModelStreamerLoader"):
        return f"{name} loads only what stock SGLang makes of a checkpoint"
    return None
