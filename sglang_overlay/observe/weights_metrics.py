# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics of what is served, and of updates: one gauge for each figure, named and described in one place."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sglang_overlay.observe.gauges import Metric
from sglang_overlay.observe.report import Role
from sglang_overlay.observe.weights_report import UpdateReport, WeightsReport

CHECKSUM_LABELS = ("role",)
UPDATE_LABELS = ("role", "kind")
"""Labels, from the fields of these names, in addition to those that SGLang gives all of a rank's metrics."""


@dataclass(frozen=True)
class LastUpdate:
    """The last update of one kind, and how many there have been of that kind."""

    role: Role
    update: UpdateReport
    updates: int
    failures: int

    @property
    def kind(self) -> str:
        """Of the update."""
        return self.update.kind


CHECKSUM_METRICS: tuple[Metric[WeightsReport], ...] = (
    Metric(
        "weights_checksum",
        "First 48 bits of the checksum of the weights that are served, after the last load or update.",
        lambda weights: math.nan if weights.checksum is None else weights.checksum.number,
    ),
    Metric(
        "weights_checksum_seconds",
        "Time to compute that checksum.",
        lambda weights: math.nan if weights.checksum is None else weights.checksum.seconds,
    ),
)

UPDATE_METRICS: tuple[Metric[LastUpdate], ...] = (
    Metric("weight_updates", "Weight updates of this kind that succeeded.", lambda last: last.updates),
    Metric(
        "weight_update_failures",
        "Weight updates of this kind that failed, and left the weights as they were.",
        lambda last: last.failures,
    ),
    Metric("weight_update_seconds", "Time of the last update of this kind.", lambda last: last.update.seconds),
    Metric(
        "weight_update_units",
        "Quantization units that hold new values since the last update of this kind.",
        lambda last: last.update.units,
    ),
    Metric(
        "weight_update_bytes", "Memory that the last update of this kind overwrote.", lambda last: last.update.bytes
    ),
    Metric(
        "weight_update_untouched_parameters",
        "Parameters that a complete checkpoint would have replaced, and the last update of this kind did not.",
        lambda last: len(last.update.untouched),
    ),
)


def last_update(report: WeightsReport) -> LastUpdate | None:
    """What there is to show of the last update."""
    update = report.last_update
    if update is None:
        return None
    counts = (found.get(update.kind, 0) for found in (report.updates, report.failed_updates))
    return LastUpdate(report.role, update, *counts)
