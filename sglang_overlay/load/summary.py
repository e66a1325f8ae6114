# SPDX-License-Identifier: Apache-2.0
"""Turn a finished load into its report."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import torch

from sglang_overlay import __version__
from sglang_overlay.load.model_load import ModelLoad
from sglang_overlay.load.model_tensors import stored_bytes, tensors_of
from sglang_overlay.load.ranks import parallel_ranks
from sglang_overlay.observe.memory import MemoryUsage
from sglang_overlay.observe.report import (
    LayerCounts,
    LayerFigures,
    LayerNote,
    LoadReport,
    Role,
    StagingUsage,
    UnitCounts,
)
from sglang_overlay.schemes.choice import MXFP8, STOCK
from sglang_overlay.settings import Mode


def summarize(
    load: ModelLoad,
    model: torch.nn.Module,
    release: str | None,
    model_config: Any,
    load_config: Any,
    times: tuple[float, float],
    memory: MemoryUsage,
) -> LoadReport:
    """The report of a load that has ended.

    Args:
        release: of SGLang, if known.
        times: begin and end of the load, from ``time.perf_counter``.
    """
    began, ended = times
    return LoadReport(
        release=release or "unknown",
        overlay_version=__version__,
        model_path=str(model_config.model_path),
        load_format=str(getattr(load_config.load_format, "value", load_config.load_format)),
        mode="streaming" if load.record.layers else "stock",
        seconds=ended - began,
        memory=memory,
        final_bytes=stored_bytes(tensor for _, tensor in tensors_of(model)),
        role=role_of(model_config),
        ranks=parallel_ranks(),
        units=UnitCounts(streamed=load.record.units, direct=load.record.direct_units),
        staging=StagingUsage(peak_bytes=load.account.peak),
        layers=LayerCounts(
            streamed=len(load.record.layers),
            deferred=_notes(load.fallback.deferred),
            fallback=_notes(load.fallback.reasons),
            figures=tuple(_figures(load, began)),
        ),
        scheme=_scheme(load, model_config),
        warnings=(*_why_stock(load), *load.checkpoint.warnings),
        missing=tuple(load.checkpoint.missing),
        node=platform.node(),
    )


def role_of(model_config: Any) -> Role:
    """The role of a model with this config of upstream's."""
    return "draft" if getattr(model_config, "is_draft_model", False) else "target"


def _scheme(load: ModelLoad, model_config: Any) -> str:
    if not load.record.layers:
        return STOCK
    return MXFP8 if model_config.quantization == MXFP8 else load.settings.schemes.text


def _why_stock(load: ModelLoad) -> list[str]:
    # No reason is needed if the user asked for stock.
    return [load.abandoned] if load.abandoned and load.settings.mode is not Mode.OFF else []


def _figures(load: ModelLoad, began: float) -> Iterator[LayerFigures]:
    for layer in load.record.layers:
        first, last = load.record.times.span(layer.name, began)
        yield LayerFigures(layer.name, layer.units, layer.direct_units, layer.size, first, last)


def _notes(reasons: dict[str, str]) -> tuple[LayerNote, ...]:
    return tuple(LayerNote(layer, reason) for layer, reason in reasons.items())
