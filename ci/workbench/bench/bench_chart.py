# SPDX-License-Identifier: Apache-2.0
"""Charts of ``ci/bench``: peak memory and load time of each contender, over the axis of each series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_overlay.observe.chart import INK
from workbench.bench.bench import (
    BF16,
    GIGABYTE,
    INTERCEPTING,
    LAYERS,
    ONE_PASS,
    STOCK,
    STREAMING,
    CaseResult,
    Figures,
    figures,
)
from workbench.bench.chart_style import dress, empty_figure

#: Of Okabe and Ito's palette, as in the charts of memory over time.
_COLOURS = {
    BF16.name: "#777777",
    STOCK.name: "#D55E00",
    LAYERS.name: "#E69F00",
    STREAMING.name: "#0072B2",
    INTERCEPTING.name: "#009E73",
    ONE_PASS.name: "#CC79A7",
}
_MARKERS = {
    BF16.name: "s",
    STOCK.name: "o",
    LAYERS.name: "^",
    STREAMING.name: "D",
    INTERCEPTING.name: "v",
    ONE_PASS.name: "P",
}


def draw(series: Mapping[str, Sequence[CaseResult]], axis: Mapping[str, str], file: Path, title: str) -> None:
    """Draw one column of panels for each series: peak above, seconds below.

    Args:
        series: results by the column's heading, ordered along its axis.
        axis: what the axis of each column shows.
        file: PNG to write.
        title: of the whole figure.
    """
    figure = empty_figure(1.2 + 3.4 * len(series), 6.4)
    panels = figure.subplots(2, len(series), squeeze=False)
    for column, (heading, results) in enumerate(series.items()):
        above, below = panels[0][column], panels[1][column]
        _lines(above, results, lambda found: found.peak / GIGABYTE)
        _lines(below, results, lambda found: found.seconds)
        _model_sizes(above, results)
        above.set_title(heading, loc="left", color=INK, fontsize=11)
        below.set_xlabel(axis[heading], color=INK)
        for panel in (above, below):
            _scale(panel, [result.case.value for result in results])
            dress(panel)
    panels[0][0].set_ylabel("peak memory above start, GB", color=INK)
    panels[1][0].set_ylabel("load, seconds", color=INK)
    panels[0][0].legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=140)


def _lines(panel: Any, results: Sequence[CaseResult], value: Any) -> None:
    found: list[dict[str, Figures]] = [figures(result.runs) for result in results]
    # Ablations are only in the table: their lines would overlap.
    for name in [name for name in found[0] if name in _COLOURS]:
        panel.plot(
            [result.case.value for result in results],
            [value(medians[name]) for medians in found],
            color=_COLOURS[name],
            marker=_MARKERS[name],
            markersize=5,
            linewidth=1.6,
            label=name,
        )


def _model_sizes(panel: Any, results: Sequence[CaseResult]) -> None:
    """Dashed lines where loads without overhead would peak."""
    sizes = [figures(result.runs)[STREAMING.name].final / GIGABYTE for result in results]
    values = [result.case.value for result in results]
    panel.plot(values, sizes, color=INK, linestyle=(0, (5, 3)), linewidth=1.0, label="loaded fp8 model", zorder=5)


def _scale(panel: Any, values: Sequence[float]) -> None:
    ticks = _apart(sorted(values))
    panel.set_xticks(ticks, [f"{value:g}" for value in ticks])
    panel.set_xlim(left=0)
    panel.set_ylim(bottom=0)


def _apart(values: Sequence[float]) -> list[float]:
    """The values, largest first, whose labels do not overlap on an axis from 0."""
    kept: list[float] = []
    for value in reversed(values):
        if not kept or kept[-1] - value >= 0.08 * values[-1]:
            kept.append(value)
    return kept
