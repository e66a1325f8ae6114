# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of loads: one gauge for each figure, named and described in one place."""

from __future__ import annotations

from typing import Any

from sglang_overlay.observe.gauges import Metric
from sglang_overlay.observe.report import LoadReport, to_json

LABELS = ("role", "mode")
"""Labels, from the load's fields of these names, in addition to those that SGLang gives all of a rank's metrics."""

METRICS: tuple[Metric[LoadReport], ...] = (
    Metric("load_seconds", "Wall-clock time of loading the weights.", lambda load: load.seconds),
    Metric(
        "load_peak_bytes",
        "Highest memory while loading the weights, above what was in use when loading began.",
        lambda load: load.memory.peak_above_start,
    ),
    Metric("model_bytes", "Memory that the loaded model's tensors hold.", lambda load: load.final_bytes),
    Metric(
        "streamed_bytes",
        "Quantized weights, and their scales, that were made while the checkpoint was read.",
        lambda load: load.streamed_bytes,
    ),
    Metric(
        "staging_peak_bytes",
        "Most high-precision memory held at once for units whose tensors had not all arrived.",
        lambda load: load.staging.peak_bytes,
    ),
    Metric("units", "Units quantized while the checkpoint was read.", lambda load: load.units.streamed),
    Metric(
        "direct_units",
        "Of those units, the ones that came whole from one tensor and needed no staging memory.",
        lambda load: load.units.direct,
    ),
    Metric("streamed_layers", "Layers quantized unit by unit.", lambda load: load.layers.streamed),
    Metric(
        "deferred_layers",
        "Layers kept in high precision until SGLang was done with them, then quantized.",
        lambda load: len(load.layers.deferred),
    ),
    Metric("fallback_layers", "Layers that were loaded as stock SGLang does.", lambda load: len(load.layers.fallback)),
    Metric(
        "missing_parameters",
        "Parameters that were not completely written from the checkpoint, and are served all the same.",
        lambda load: len(load.missing),
    ),
    Metric("warnings", "Warnings about the load.", lambda load: len(load.warnings)),
)


def state_of(load: LoadReport) -> dict[str, Any]:
    """A load as in a server's ``/server_info``: its report without the long parts."""
    state = to_json(load)
    del state["memory"]["samples"], state["layers"]["figures"]
    return {**state, "streamed_bytes": load.streamed_bytes}
