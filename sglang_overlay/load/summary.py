# SPDX-License-Identifier: Apache-2.0
"""Turn a finished load into its report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sglang_overlay import __version__
from sglang_overlay.load.model_load import tensors_of
from sglang_overlay.load.overlay_load import OverlayLoad
from sglang_overlay.load.ranks import parallel_ranks
from sglang_overlay.observe.memory import MemoryUsage
from sglang_overlay.observe.report import (
    LayerCounts,
    LayerFigures,
    LayerNote,
    LoadReport,
    StagingUsage,
    UnitCounts,
)
from sglang_overlay.schemes.choice import MXFP8, STOCK
from sglang_overlay.settings import Mode


def summarize(
    load: OverlayLoad,
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
        mode="streaming" if load.layers else "stock",
        seconds=ended - began,
        memory=memory,
        final_bytes=stored_bytes(tensor for _, tensor in tensors_of(model)),
        role="draft" if getattr(model_config, "is_draft_model", False) else "target",
        ranks=parallel_ranks(),
        units=UnitCounts(streamed=load.units, direct=load.direct_units),
        staging=StagingUsage(peak_bytes=load.account.peak),
        layers=LayerCounts(
            streamed=load.layers,
            deferred=_notes(load.deferred),
            fallback=_notes(load.fallback),
            figures=tuple(_figures(load, began)),
        ),
        scheme=_scheme(load, model_config),
        warnings=(*_why_stock(load), *load.checkpoint.warnings),
        missing=tuple(load.missing),
    )


def _scheme(load: OverlayLoad, model_config: Any) -> str:
    if not load.layers:
        return STOCK
    return MXFP8 if model_config.quantization == MXFP8 else load.settings.schemes.text


def stored_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages; of meta tensors, what they would take. Shared memory is counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr() or storage._cdata: storage.nbytes() for storage in storages}.values())


def _why_stock(load: OverlayLoad) -> list[str]:
    # No reason is needed if the user asked for stock.
    return [load.abandoned] if load.abandoned and load.settings.mode is not Mode.OFF else []


def _figures(load: OverlayLoad, began: float) -> Iterator[LayerFigures]:
    for layer in load.settled:
        first, last = load.times.span(layer.name, began)
        yield LayerFigures(layer.name, layer.units, layer.direct_units, layer.size, first, last)


def _notes(reasons: dict[str, str]) -> tuple[LayerNote, ...]:
    return tuple(LayerNote(layer, reason) for layer, reason in reasons.items())
