# SPDX-License-Identifier: Apache-2.0
"""Turn a finished load into its report."""

from __future__ import annotations

from typing import Any

import torch

from sglang_overlay import __version__
from sglang_overlay.observe.memory import MemoryUsage
from sglang_overlay.observe.report import (
    LayerCounts,
    LayerNote,
    LoadReport,
    StagingUsage,
    UnitCounts,
)
from sglang_overlay.schemes.choice import MXFP8, STOCK
from sglang_overlay.upstream import releases
from sglang_overlay.upstream.load import tensors_of
from sglang_overlay.upstream.overlay_load import OverlayLoad
from sglang_overlay.upstream.ranks import parallel_ranks


def summarize(
    load: OverlayLoad, model: torch.nn.Module, model_config: Any, load_config: Any, seconds: float, memory: MemoryUsage
) -> LoadReport:
    """The report of a load that has ended."""
    return LoadReport(
        release=releases.installed() or "unknown",
        overlay_version=__version__,
        model_path=str(model_config.model_path),
        load_format=str(getattr(load_config.load_format, "value", load_config.load_format)),
        mode="streaming" if load.layers else "stock",
        seconds=seconds,
        memory=memory,
        final_bytes=stored_bytes(model),
        role="draft" if getattr(model_config, "is_draft_model", False) else "target",
        ranks=parallel_ranks(),
        units=UnitCounts(streamed=load.units, direct=load.direct_units),
        staging=StagingUsage(peak_bytes=load.account.peak),
        layers=LayerCounts(streamed=load.layers, deferred=_notes(load.deferred), fallback=_notes(load.fallback)),
        scheme=_scheme(load, model_config),
        warnings=(*([load.abandoned] if load.abandoned else []), *load.warnings),
    )


def _scheme(load: OverlayLoad, model_config: Any) -> str:
    if not load.layers:
        return STOCK
    return MXFP8 if model_config.quantization == MXFP8 else load.settings.schemes.text


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all memory that the model's tensors hold, shared memory counted once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for _, t in tensors_of(model))}
    return sum(storages.values())


def _notes(reasons: dict[str, str]) -> tuple[LayerNote, ...]:
    return tuple(LayerNote(layer, reason) for layer, reason in reasons.items())
