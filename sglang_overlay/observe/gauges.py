# SPDX-License-Identifier: Apache-2.0
"""Prometheus gauges of a rank: one for each figure of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

PREFIX = "sglang:streamfp8_"
Report = TypeVar("Report")


@dataclass(frozen=True)
class Metric(Generic[Report]):
    """A figure of a report.

    Attributes:
        name: the metric's name after ``PREFIX``; ends with the unit if there is one.
        documentation: the text that Prometheus shows.
        value: returns the figure of a report.
    """

    name: str
    documentation: str
    value: Callable[[Report], float]


class Gauges(Generic[Report]):
    """The gauges of one kind of report.

    Args:
        gauge: ``prometheus_client.Gauge``, or a replacement.
        metrics: the figures.
        common: labels of every series of this rank.
        labels: names of further labels, which are fields of the report.
    """

    def __init__(
        self,
        gauge: Callable[..., Any],
        metrics: Sequence[Metric[Report]],
        common: Mapping[str, Any],
        labels: Sequence[str],
    ) -> None:
        self._common = dict(common)
        self._labels = labels
        names = (*self._common, *labels)
        # As for SGLang's own: if several processes have the same series, the one that was set last counts.
        self._gauges = [
            (
                metric,
                gauge(f"{PREFIX}{metric.name}", metric.documentation, labelnames=names, multiprocess_mode="mostrecent"),
            )
            for metric in metrics
        ]

    def show(self, report: Report) -> None:
        """Set every gauge to this report's figure."""
        labels = {**self._common, **{name: getattr(report, name) for name in self._labels}}
        for metric, gauge in self._gauges:
            gauge.labels(**labels).set(metric.value(report))
