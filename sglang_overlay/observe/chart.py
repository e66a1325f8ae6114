# SPDX-License-Identifier: Apache-2.0
"""Draw memory over time as a PNG: one line per load, stock beside streaming, the loaded model's size dashed.

Needs matplotlib, which serving does not need: hence the optional extra ``chart``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.observe.formats import GIGABYTE, bytes_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_overlay.observe.report import LoadReport

# Lines of one curve: among more, nobody finds one, and a page of a large fleet would take megabytes.
_DRAWN = 24

# Vermilion, blue, green and purple of Okabe and Ito's palette: distinguishable with every form of colour blindness, and
# by lightness on a grey printout.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
INK = "#333333"
GRID = "#E3E3E3"


class ChartError(StreamFP8Error):
    """The chart could not be drawn or written."""


@dataclass(frozen=True)
class Curve:
    """Loads drawn in one colour under one name, such as the ranks of one server."""

    label: str
    reports: tuple[LoadReport, ...]

    @property
    def peak(self) -> int:
        """Highest peak above start among the loads, in bytes."""
        return self.highest.memory.peak_above_start

    @property
    def highest(self) -> LoadReport:
        """The load with the highest peak, which decides whether the model fits."""
        return max(self.reports, key=lambda report: report.memory.peak_above_start)

    @property
    def drawn(self) -> tuple[LoadReport, ...]:
        """The loads that are drawn: of very many the highest, the slowest, and some of the others."""
        if len(self.reports) <= _DRAWN:
            return self.reports
        step = -(-len(self.reports) // (_DRAWN - 2))
        kept = {id(self.highest), id(max(self.reports, key=lambda report: report.seconds))}
        return tuple(one for at, one in enumerate(self.reports) if at % step == 0 or id(one) in kept)


def draw(curves: Sequence[Curve], file: Path | str, title: str) -> Path:
    """Draw ``curves`` into the PNG ``file`` and return its path.

    Raises:
        ChartError: matplotlib is missing, there are no samples, or the file cannot be written.
    """
    if not any(report.memory.samples for curve in curves for report in curve.reports):
        raise ChartError("these reports hold no memory samples, so there is nothing to draw")
    return write(_figure(curves, title), file)


def empty_figure() -> tuple[Any, Any]:
    """A figure of this package's size, and its axes.

    Raises:
        ChartError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ChartError("a chart needs matplotlib: pip install matplotlib") from error
    # Without pyplot, whose global state and window toolkits do not belong in a server process.
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def write(figure: Any, file: Path | str) -> Path:
    """Write a figure into the PNG ``file`` and return its path.

    Raises:
        ChartError: the file cannot be written.
    """
    target = Path(file)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, format="png", dpi=160)
    except OSError as error:
        raise ChartError(f"the chart could not be written to {target}: {error}") from error
    return target


def dress(axes: Any, title: str, along: str, up: str) -> None:
    """Add title, labels, grid and legend in this package's style."""
    axes.set_title(title, loc="left", color=INK, fontsize=12)
    axes.set_xlabel(along, color=INK)
    axes.set_ylabel(up, color=INK)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="best", labelcolor=INK)


def _figure(curves: Sequence[Curve], title: str) -> Any:
    figure, axes = empty_figure()
    for index, curve in enumerate(curves):
        _draw_curve(axes, curve, COLOURS[index % len(COLOURS)])
    _draw_model_size(axes, curves)
    _dress(axes, curves, title)
    return figure


def _draw_curve(axes: Any, curve: Curve, colour: str) -> None:
    """All ranks as lines; the one with the highest peak stands out."""
    highest = curve.highest
    for report in curve.drawn:
        if report is not highest:
            axes.plot(*_points(report), color=colour, linewidth=1.0, alpha=0.5, zorder=3)
    ranks = f" (highest of {len(curve.reports)} loads)" if len(curve.reports) > 1 else ""
    label = f"{curve.label}: peak +{bytes_text(curve.peak)}{ranks}"
    seconds, sizes = _points(highest)
    axes.plot(seconds, sizes, color=colour, linewidth=1.8, label=label, zorder=4)
    axes.fill_between(seconds, sizes, color=colour, alpha=0.08, linewidth=0, zorder=2)
    _mark_peak(axes, highest, colour)


def _points(report: LoadReport) -> tuple[list[float], list[float]]:
    """Seconds, and GB above start."""
    samples = report.memory.samples
    return [second for second, _ in samples], [above / GIGABYTE for _, above in samples]


def _mark_peak(axes: Any, report: LoadReport, colour: str) -> None:
    if not report.memory.samples:
        return
    second, above = max(report.memory.samples, key=lambda sample: sample[1])
    axes.plot([second], [above / GIGABYTE], "o", color=colour, markersize=6, markeredgecolor="white", zorder=5)


def _draw_model_size(axes: Any, curves: Sequence[Curve]) -> None:
    """Dashed lines where a load without overhead would end, one for each distinct size among ranks and roles."""
    sizes = sorted({report.final_bytes for curve in curves for report in curve.reports})
    label: str | None = f"loaded model: {' and '.join(bytes_text(size) for size in sizes[:3])}"
    for size in sizes:
        axes.axhline(size / GIGABYTE, color=INK, linestyle=(0, (6, 4)), linewidth=1.2, label=label, zorder=1)
        label = None


def _dress(axes: Any, curves: Sequence[Curve], title: str) -> None:
    metrics = sorted({report.memory.metric for curve in curves for report in curve.reports})
    axes.set_xlim(left=0)
    highest = max(max(curve.peak, *(report.final_bytes for report in curve.reports)) for curve in curves)
    axes.set_ylim(0, 1.12 * highest / GIGABYTE or 1)
    dress(axes, title, "seconds since the load began", f"memory above start, GB ({', '.join(metrics)})")
