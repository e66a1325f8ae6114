# SPDX-License-Identifier: Apache-2.0
"""Draw planned memory over bytes read, as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_overlay.observe import chart
from sglang_overlay.observe.formats import GIGABYTE, bytes_text

if TYPE_CHECKING:
    from sglang_overlay.offline.plan.gpus import GPU
    from sglang_overlay.offline.plan.job import Mode, PlannedLoad, Sample
    from sglang_overlay.offline.plan.planner import Plan

LABELS: dict[Mode, str] = {
    "stock": "stock",
    "layers": "whole layers",
    "complete_layers": "complete layers",
    "streaming": "streaming",
}
_COLOURS: dict[Mode, int] = {"stock": 0, "layers": 2, "complete_layers": 3, "streaming": 1}
_AFTER_READING = 0.15
"""Width of the part after the last byte read, relative to the part before, since bytes do not measure its progress."""


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    colour: int
    samples: Sequence[Sample]


def draw(plan: Plan, file: Path, title: str, gpu: GPU | None = None) -> Path:
    """Draw the highest rank of each mode into the PNG ``file`` and return its path.

    Raises:
        ChartError: matplotlib is missing, or the file cannot be written.
    """
    loads = [plan.highest(mode) for mode in plan.request.modes]
    levels = {"loaded model": loads[-1].final}
    if gpu is not None:
        levels[f"usable on {gpu.name}"] = gpu.usable
    return draw_lines([_line(load) for load in loads], levels, file, title)


def draw_lines(lines: Sequence[Line], levels: dict[str, int], file: Path, title: str) -> Path:
    """Draw curves, and levels (bytes by label) as dashed lines, into the PNG ``file`` and return its path.

    Raises:
        ChartError: matplotlib is missing, or the file cannot be written.
    """
    figure, axes = chart.empty_figure()
    for line in lines:
        xs, ys = _points(line.samples)
        colour = chart.COLOURS[line.colour]
        axes.plot(xs, ys, color=colour, linewidth=1.8, label=line.label, zorder=4)
        axes.fill_between(xs, ys, color=colour, alpha=0.08, linewidth=0, zorder=2)
    _dress(axes, lines, levels, title)
    return chart.write(figure, file)


def _line(load: PlannedLoad) -> Line:
    return Line(f"{LABELS[load.mode]}: peak {bytes_text(load.peak)}", _COLOURS[load.mode], load.samples)


def _points(samples: Sequence[Sample]) -> tuple[list[float], list[float]]:
    """GB read, and GB of memory; samples after the last byte are spread over a separate band."""
    total = max(read for read, _ in samples)
    before = [sample for sample in samples if sample[0] < total]
    after = [sample for sample in samples if sample[0] == total]
    width = _AFTER_READING * total / max(1, len(after) - 1)
    places = [*(read for read, _ in before), *(total + width * number for number in range(len(after)))]
    return [place / GIGABYTE for place in places], [held / GIGABYTE for _, held in (*before, *after)]


def _dress(axes: Any, lines: Sequence[Line], levels: dict[str, int], title: str) -> None:
    total = max(read for line in lines for read, _ in line.samples)
    axes.axvspan(total / GIGABYTE, (1 + _AFTER_READING) * total / GIGABYTE, color=chart.GRID, alpha=0.5, zorder=0)
    for number, (name, size) in enumerate(levels.items()):
        style = (0, (6, 4)) if number == 0 else (0, (2, 2))
        axes.axhline(size / GIGABYTE, color=chart.INK, linestyle=style, label=f"{name}: {bytes_text(size)}", zorder=1)
    highest = max(held for line in lines for _, held in line.samples)
    axes.set_ylim(0, 1.12 * max(highest, *levels.values()) / GIGABYTE or 1)
    axes.set_xlim(0, (1 + _AFTER_READING) * total / GIGABYTE)
    chart.dress(axes, title, "GB of the checkpoint read (shaded: after the last byte)", "memory of one rank, GB")
