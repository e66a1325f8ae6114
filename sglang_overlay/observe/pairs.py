# SPDX-License-Identifier: Apache-2.0
"""Pair each load of one set with its counterpart in another, and compute ratios."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_overlay.observe.report import LoadReport, Ranks, Role

    Key = tuple[Ranks, Role]


@dataclass(frozen=True)
class Pair:
    """The same load done in two ways; ratios are second over first, None if the first is 0."""

    first: LoadReport
    second: LoadReport

    @property
    def seconds_ratio(self) -> float | None:
        return _ratio(self.second.seconds, self.first.seconds)

    @property
    def peak_ratio(self) -> float | None:
        """Ratio of peak memory above start; None also if the two were measured by different metrics."""
        if self.first.memory.metric != self.second.memory.metric:
            return None
        return _ratio(self.second.memory.peak_above_start, self.first.memory.peak_above_start)


def pair_up(first: Sequence[LoadReport], second: Sequence[LoadReport]) -> list[Pair]:
    """Pair loads of the same ranks and role, the n-th of ``first`` with the n-th of ``second``.

    Loads without a counterpart are left out.
    """
    waiting: defaultdict[Key, list[LoadReport]] = defaultdict(list)
    for report in second:
        waiting[report.ranks, report.role].append(report)
    pairs = []
    for report in first:
        partners = waiting[report.ranks, report.role]
        if partners:
            pairs.append(Pair(report, partners.pop(0)))
    return pairs


def stock_first(first: Sequence[LoadReport], second: Sequence[LoadReport]) -> bool:
    """Whether ``first`` is the baseline: always, unless only ``second`` is all stock."""
    return _all_stock(first) or not _all_stock(second)


def _all_stock(reports: Sequence[LoadReport]) -> bool:
    return all(report.mode == "stock" for report in reports)


def _ratio(second: float, first: float) -> float | None:
    return second / first if first > 0 else None
