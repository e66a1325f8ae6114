# SPDX-License-Identifier: Apache-2.0
"""Charts of ``ci/bench``: peak memory and load time of each contender, over the axis of each series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib import rc_context

from sglang_overlay.observe.chart import GRID, INK
from workbench.bench.bench import (
    BF16,
    COMPLETE_LAYERS,
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
from workbench.bench.update_bench import AFTER, FRESH, UpdateRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Of Okabe and Ito's palette, as in the charts of memory over time.
_COLOURS = {
    BF16.name: "#777777",
    STOCK.name: "#D55E00",
    LAYERS.name: "#E69F00",
    COMPLETE_LAYERS.name: "#F0E442",
    STREAMING.name: "#0072B2",
    INTERCEPTING.name: "#009E73",
    ONE_PASS.name: "#CC79A7",
}
_FRESH_COLOUR = {FRESH: "#56B4E9"}
_MARKERS = {
    BF16.name: "s",
    STOCK.name: "o",
    LAYERS.name: "^",
    COMPLETE_LAYERS.name: "<",
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
    _save(figure, file)


def draw_updates(results: Sequence[CaseResult], file: Path, title: str) -> None:
    """Draw bars for each checkpoint: seconds of each update beside the fresh load, and memory above the steady state.

    Args:
        results: of ``update_bench``.
        file: PNG or SVG to write.
        title: of the whole figure.
    """
    figure = empty_figure(9.0, 0.8 + 2.2 * len(results))
    panels = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), result in zip(panels, results, strict=True):
        found = figures(result.runs)
        colours = {name: _COLOURS[STREAMING.name if name.startswith(AFTER) else BF16.name] for name in found}
        left.barh([*found], [each.seconds for each in found.values()], color=[*(colours | _FRESH_COLOUR).values()])
        undo = {run.contender: run.undo / GIGABYTE for run in result.runs if isinstance(run, UpdateRun)}
        del undo[FRESH]
        rest = [found[name].peak / GIGABYTE - size for name, size in undo.items()]
        kept = {"color": GRID, "edgecolor": INK, "linewidth": 0.5, "label": "kept to undo it"}
        right.barh([*undo], [*undo.values()], **kept)
        right.barh([*undo], rest, left=[*undo.values()], color=[colours[name] for name in undo])
        left.set_title(result.case.name, loc="left", color=INK, fontsize=11)
        for panel in (left, right):
            panel.invert_yaxis()
            dress(panel)
    panels[-1][0].set_xlabel("seconds", color=INK)
    panels[-1][1].set_xlabel("memory above the steady state, GB", color=INK)
    panels[0][1].legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=12)
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # An SVG with text as text, without date and random names: small, and the same when drawn again.
    with rc_context({"svg.hashsalt": file.name, "svg.fonttype": "none"}):
        figure.savefig(file, dpi=140, metadata={"Date": None} if file.suffix == ".svg" else None)


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
