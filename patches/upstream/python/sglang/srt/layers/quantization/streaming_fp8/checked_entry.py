# SPDX-License-Identifier: Apache-2.0
"""As ``entry.py``, with a look at what the checkpoint lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.streaming_fp8.checkpoint_watch import CheckpointWatch
from sglang.srt.layers.quantization.streaming_fp8.diagnostics import Tolerance
from sglang.srt.layers.quantization.streaming_fp8.entry import stream
from sglang.srt.layers.quantization.streaming_fp8.model_load import ModelLoad


def load_model(original: Callable[..., Any], loader: Any, *, model_config: Any, device_config: Any) -> Any:
    """Around ``DefaultModelLoader.load_model``."""
    switch = envs.SGLANG_STREAMFP8_ALLOW_MISSING
    tolerance = Tolerance(missing=switch.get(), missing_switch=f"{switch.name}=1")

    def begin(obstacle: str | None, excluded: Mapping[str, str]) -> ModelLoad:
        return ModelLoad(obstacle, excluded, checkpoint=CheckpointWatch(tolerance))

    return stream(begin, original, loader, model_config, device_config)
