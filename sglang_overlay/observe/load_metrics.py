# SPDX-License-Identifier: Apache-2.0
"""What a Prometheus server is told of a load: one gauge for each figure, named and described in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_overlay.observe.report import LoadReport, to_json

PREFIX = "sglang:streamfp8_"
LABELS = ("role", "mode")
"""Besides those that SGLang gives each of a rank's metrics: the load's fields of these names."""


@dataclass(frozen=True)
class LoadMetric:
    """A figure of a load.

    Attributes:
        name: after ``PREFIX``; ends with the unit where there is one.
        documentation: as Prometheus shows it.
        value: of a load.
    """

    name: str
    documentation: str
    value: Callable[[LoadReport], float]


METRICS = (
    LoadMetric("load_seconds", "Wall-clock time of loading the weights.", lambda load: load.seconds),
    LoadMetric(
        "load_peak_bytes",
        "Highest memory while loading the weights, above what was in use when loading began.",
        lambda load: load.memory.peak_above_start,
    ),
    LoadMetric("model_bytes", "Memory that the loaded model's tensors hold.", lambda load: load.final_bytes),
    LoadMetric(
        "streamed_bytes",
        "Quantized weights, and their scales, that were made while the checkpoint was read.",
        lambda load: load.streamed_bytes,
    ),
    LoadMetric(
        "staging_peak_bytes",
        "Most high-precision memory held at once for units whose tensors had not all arrived.",
        lambda load: load.staging.peak_bytes,
    ),
    LoadMetric("units", "Units quantized while the checkpoint was read.", lambda load: load.units.streamed),
    LoadMetric(
        "direct_units",
        "Of those units, the ones that came whole from one tensor and needed no staging memory.",
        lambda load: load.units.direct,
    ),
    LoadMetric("streamed_layers", "Layers quantized unit by unit.", lambda load: load.layers.streamed),
    LoadMetric(
        "deferred_layers",
        "Layers kept in high precision until SGLang was done with them, then quantized.",
        lambda load: len(load.layers.deferred),
    ),
    LoadMetric(
        "fallback_layers", "Layers that were loaded as stock SGLang does.", lambda load: len(load.layers.fallback)
    ),
    LoadMetric(
        "missing_parameters",
        "Parameters that were not completely written from the checkpoint, and are served all the same.",
        lambda load: len(load.missing),
    ),
    LoadMetric("warnings", "Warnings about the load.", lambda load: len(load.warnings)),
)


class LoadGauges:
    """The gauges of one rank.

    Args:
        gauge: ``prometheus_client.Gauge``, or what takes its place.
        labels: of every series of this rank.
    """

    def __init__(self, gauge: Callable[..., Any], labels: Mapping[str, Any]) -> None:
        self._labels = dict(labels)
        names = (*self._labels, *LABELS)
        # As SGLang's own: of several processes that have the same series, the one that set it last counts.
        self._gauges = [
            gauge(f"{PREFIX}{metric.name}", metric.documentation, labelnames=names, multiprocess_mode="mostrecent")
            for metric in METRICS
        ]

    def show(self, load: LoadReport) -> None:
        """Set every gauge to what it is of this load."""
        labels = {**self._labels, **{name: getattr(load, name) for name in LABELS}}
        for metric, gauge in zip(METRICS, self._gauges, strict=True):
            gauge.labels(**labels).set(metric.value(load))


def state_of(load: LoadReport) -> dict[str, Any]:
    """A load as a server tells of it when it is asked: its report without what is long."""
    state = to_json(load)
    del state["memory"]["samples"], state["layers"]["figures"]
    return {**state, "streamed_bytes": load.streamed_bytes}
