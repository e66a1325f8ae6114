# SPDX-License-Identifier: Apache-2.0
"""``Fp8LinearMethod`` of a load that is streamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.layers.quantization.streaming_fp8.model_load import create_streamed, process_streamed
from sglang.srt.layers.quantization.streaming_fp8.stock_linear import LinearPlan, is_per_channel
from torch.nn import Module


def create_weights(original: Callable[..., None], method: Any, layer: Module, *args: Any, **kwargs: Any) -> None:
    """Around ``Fp8LinearMethod.create_weights``."""
    create_streamed(original, lambda: LinearPlan(per_channel=is_per_channel(method)), method, layer, *args, **kwargs)


def process_weights_after_loading(original: Callable[..., None], method: Any, layer: Module) -> None:
    """Around ``Fp8LinearMethod.process_weights_after_loading``."""
    process_streamed(original, method, layer)
