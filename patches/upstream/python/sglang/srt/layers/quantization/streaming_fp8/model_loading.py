# SPDX-License-Identifier: Apache-2.0
"""Around SGLang's ``model_loader/loader.py``: a load that is streamed, and the way out where it cannot be."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from sglang.srt.layers.quantization.streaming_fp8.errors import LayerNotStreamableError, PlaceholderLeakError, annotate
from sglang.srt.layers.quantization.streaming_fp8.model_load import ModelLoad, current, under_way
from sglang.srt.layers.quantization.streaming_fp8.shortage import is_shortage


def load_streamed(
    read: Callable[[], torch.nn.Module],
    begin: Callable[[str | None, Mapping[str, str]], ModelLoad],
    obstacle: str | None,
    model_config: Any,
) -> tuple[ModelLoad, torch.nn.Module]:
    """Load a model; where it turns out too late that something cannot be streamed, load it anew.

    Layers that are at fault then take stock's path, any number of them. Where it is none in particular, all do.

    Args:
        read: upstream's own way to load the model.
        begin: makes a load, given why it cannot stream at all, and why certain layers, by name, must not be streamed.
        obstacle: why the model cannot be streamed, if so known beforehand.
        model_config: upstream's.
    """
    excluded: dict[str, str] = {}
    while True:
        load = begin(obstacle, excluded)
        try:
            with under_way(load), contextlib.closing(load):
                model = _read(read, load)
                if not load.lost:
                    load.check(model, model_config)
                    return load, model
            excluded |= _anew(load.lost)
            del model
        except LayerNotStreamableError as error:
            if error.layer in excluded:
                raise
            excluded |= _anew({**load.lost, error.layer: error.reason})
        except PlaceholderLeakError as error:
            if obstacle is not None:
                raise
            obstacle = f"{error}; the model was loaded anew"
        # Out of the except block, whose traceback keeps the first model's memory.
        del load
        gc.collect()


def _anew(lost: Mapping[str, str]) -> dict[str, str]:
    """Why layers are to be excluded from the next load."""
    return {layer: f"{reason}; the model was loaded anew" for layer, reason in lost.items()}


def _read(read: Callable[[], torch.nn.Module], load: ModelLoad) -> torch.nn.Module:
    try:
        with load.reading():
            return read()
    except Exception as error:
        for note in load.explain(error):
            annotate(error, f"StreamFP8: {note}")
        raise


def initialize_model(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around ``_initialize_model``: build the model with placeholders, or again without where it cannot take them."""
    load = current()
    if load is None or load.abandoned:
        return original(*args, **kwargs)
    try:
        model = original(*args, **kwargs)
        reason = load.adopt(model)
    except Exception as error:
        if not load.building or is_shortage(error) or isinstance(error, load.final):
            raise  # Without placeholders it would need more memory still, or not be what was asked for.
        reason = f"building it with placeholders fails ({type(error).__name__}: {error})"
    if reason is not None:
        model = None
        load.abandon(reason)
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        load.refuse(f"{_architecture(call)} cannot be streamed: {reason}")
        return original(*args, **kwargs)
    return model


def device_loading_context(original: Callable[..., Any], module: torch.nn.Module, target_device: torch.device) -> Any:
    """Around ``device_loading_context``."""
    load = current()
    if load is not None:
        load.finish(module)
    return original(module, target_device)


def _architecture(call: Mapping[str, Any]) -> str:
    return ", ".join(getattr(call["model_config"].hf_config, "architectures", None) or ["this model"])
