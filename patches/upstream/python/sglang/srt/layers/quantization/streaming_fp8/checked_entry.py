# SPDX-License-Identifier: Apache-2.0
"""As ``entry.py``, with a look at what the checkpoint lacks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.streaming_fp8.checked_load import CheckedLoad
from sglang.srt.layers.quantization.streaming_fp8.diagnostics import Tolerance
from sglang.srt.layers.quantization.streaming_fp8.entry import stream


def load_model(original: Callable[..., Any], loader: Any, *, model_config: Any, device_config: Any) -> Any:
    """Around ``DefaultModelLoader.load_model``."""
    switch = envs.SGLANG_STREAMFP8_ALLOW_MISSING
    tolerance = Tolerance(missing=switch.get(), missing_switch=f"{switch.name}=1")
    return stream(partial(CheckedLoad, tolerance), original, loader, model_config, device_config)
