# SPDX-License-Identifier: Apache-2.0
"""Load a model, and load it anew where it turns out too late that something cannot be streamed."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sglang_overlay.core.errors import LayerNotStreamableError, StreamFP8Error
from sglang_overlay.core.load_errors import PlaceholderLeakError
from sglang_overlay.core.messages import annotate
from sglang_overlay.core.shortage import is_shortage
from sglang_overlay.load.model_load import ModelLoad, under_way


def load_streamed(
    read: Callable[[], torch.nn.Module],
    begin: Callable[..., ModelLoad],
    obstacle: str | None,
    model_config: Any,
) -> tuple[ModelLoad, torch.nn.Module]:
    """Load a model; where it turns out too late that something cannot be streamed, load it anew.

    Layers that are at fault then take stock's path, any number of them. Where it is not known which, the model is
    loaded once while what it reads is watched, to find them; where that does not help, all layers take stock's path.

    Args:
        read: upstream's own way to load the model.
        begin: makes a load, as ``ModelLoad`` does given ``obstacle``, ``excluded``, ``told`` and ``watches_reads``.
        obstacle: why the model cannot be streamed, if so known beforehand.
        model_config: upstream's.
    """
    excluded: dict[str, str] = {}
    told: set[str] = set()
    watches_reads = False
    while True:
        load = begin(obstacle, excluded, told=frozenset(told), watches_reads=watches_reads)
        told.update(excluded)
        try:
            with under_way(load), contextlib.closing(load):
                model = _read(read, load)
                if not load.fallback.lost:
                    load.check(model, model_config)
                if not load.fallback.lost:
                    load.end()
                    return load, model
            excluded |= _anew(load.fallback.lost)
            watches_reads = False
            del model
        except LayerNotStreamableError as error:
            if error.layer in excluded:
                raise
            excluded |= _anew({**load.fallback.lost, error.layer: error.reason})
        except Exception as error:
            reason = _due_to_placeholders(error, load)
            if obstacle is not None or reason is None:
                raise
            if watches_reads:
                obstacle = f"{reason}; the model was loaded anew"
            watches_reads = not watches_reads
        # Out of the except block, whose traceback keeps the first model's memory.
        del load
        gc.collect()


def _due_to_placeholders(error: Exception, load: ModelLoad) -> str | None:
    """What the model does with weights that have no memory; None if the error has another reason."""
    if isinstance(error, PlaceholderLeakError):
        return str(error)
    if not load.has_placeholders or not needs_memory(error):
        return None
    return f"it computes with weights while they are loaded ({_first_line(error)})"


_META = re.compile(
    r"(?<![\w./-])(register_)?meta(?![\w/-]|\.\w)|`variable` and `tensor` have incompatible tensor type", re.IGNORECASE
)
"""The device by name, as torch's errors have it, but not as a part of a path; and what assigning ``data`` says."""


def needs_memory(error: BaseException) -> bool:
    """Whether an error may be due to a tensor without memory, and would then not be raised in stock."""
    if isinstance(error, (StreamFP8Error, OSError)) or is_shortage(error):
        return False
    cause = error.__cause__ or error.__context__
    return _META.search(str(error)) is not None or (cause is not None and needs_memory(cause))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


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
