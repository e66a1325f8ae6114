# SPDX-License-Identifier: Apache-2.0
"""A load's Prometheus metrics: one gauge for each figure, named and described in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_overlay.observe.report import LoadReport, to_json

PREFIX = "sglang:streamfp8_"
LABELS = ("role", "mode")
"""Labels, from the load's fields of these names, in addition to those that SGLang gives all of a rank's metrics."""


@dataclass(frozen=True)
class LoadMetric:
    """A figure of a load.

    Attributes:
        name: the metric's name after ``PREFIX``; ends with the unit if there is one.
        documentation: the text that Prometheus shows.
        value: returns the figure of a load.
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
        gauge: ``prometheus_client.Gauge``, or a replacement.
        labels: labels of every series of this rank.
    """

    def __init__(self, gauge: Callable[..., Any], labels: Mapping[str, Any]) -> None:
        self._labels = dict(labels)
        names = (*self._labels, *LABELS)
        # As for SGLang's own: if several processes have the same series, the one that was set last counts.
        self._gauges = [
            gauge(f"{PREFIX}{metric.name}", metric.documentation, labelnames=names, multiprocess_mode="mostrecent")
            for metric in METRICS
        ]

    def show(self, load: LoadReport) -> None:
        """Set every gauge to this load's figure."""
        labels = {**self._labels, **{name: getattr(load, name) for name in LABELS}}
        for metric, gauge in zip(METRICS, self._gauges, strict=True):
            gauge.labels(**labels).set(metric.value(load))


def state_of(load: LoadReport) -> dict[str, Any]:
    """A load as in a server's ``/server_info``: its report without the long parts."""
    state = to_json(load)
    del state["memory"]["samples"], state["layers"]["figures"]
    return {**state, "streamed_bytes": load.streamed_bytes}
