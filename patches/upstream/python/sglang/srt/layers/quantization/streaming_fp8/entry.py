# SPDX-License-Identifier: Apache-2.0
"""Which loads are streamed: those of ``DefaultModelLoader`` with ``--quantization fp8``, unless switched off."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.streaming_fp8 import eligibility
from sglang.srt.layers.quantization.streaming_fp8.model_load import ModelLoad
from sglang.srt.layers.quantization.streaming_fp8.model_loading import load_streamed

logger = logging.getLogger(__name__)


def load_model(original: Callable[..., Any], loader: Any, *, model_config: Any, device_config: Any) -> Any:
    """Around ``DefaultModelLoader.load_model``."""
    return stream(ModelLoad, original, loader, model_config, device_config)


def stream(
    begin: Callable[[str | None, Mapping[str, str]], ModelLoad],
    original: Callable[..., Any],
    loader: Any,
    model_config: Any,
    device_config: Any,
) -> Any:
    """Load a model, streamed where it can be.

    Args:
        begin: as of ``load_streamed``.
        original: the loader's own ``load_model``, given ``loader``, ``model_config`` and ``device_config``.
    """

    def read() -> Any:
        return original(loader, model_config=model_config, device_config=device_config)

    if model_config.quantization != "fp8" or not envs.SGLANG_STREAMFP8.get() or not _is_default(loader):
        return read()
    obstacle = eligibility.why_not_platform() or eligibility.why_not_options()
    load, model = load_streamed(read, begin, obstacle, model_config)
    if load.layers:
        logger.info(
            "StreamFP8: quantized %d units of %d layers while they were read; "
            "at most %.1f MB were staged in high precision.",
            load.units,
            load.layers,
            load.account.peak / 1e6,
        )
    return model


def _is_default(loader: Any) -> bool:
    """Subclasses load layer by layer, or quantize in a way of their own."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    return type(loader) is DefaultModelLoader
