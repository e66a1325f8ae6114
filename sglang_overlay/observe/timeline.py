# SPDX-License-Identifier: Apache-2.0
"""Memory over time as lines on a page: where each sample goes, and what the axes say. No drawing library is needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_overlay.observe.chart import Curve
from sglang_overlay.observe.formats import bytes_text, seconds_text
from sglang_overlay.observe.report import LoadReport

_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 64, 14, 12, 44
_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in pixels, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One load's memory: ``points`` is for SVG's ``polyline``; ``highest`` for the load with its curve's highest peak.

    ``peak`` is where it is highest, in pixels.
    """

    curve: int
    points: str
    highest: bool
    peak: tuple[float, float]


@dataclass(frozen=True)
class Timeline:
    """A chart of ``width`` times ``height`` pixels; the area between the axes is ``left`` to ``right``."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]
    lines: tuple[Line, ...]
    models: tuple[float, ...]
    """Heights at which a load that wasted nothing would end."""


def timeline(curves: Sequence[Curve], width: int, height: int) -> Timeline | None:
    """Lay the curves out; None where there are no samples."""
    loads = [load for curve in curves for load in curve.reports]
    if not any(load.memory.samples for load in loads):
        return None
    most = max(max(load.memory.peak_above_start, load.final_bytes) for load in loads)
    longest = max(second for load in loads for second, _ in load.memory.samples)
    across = _Scale(longest or 1.0, _MARGIN_LEFT, width - _MARGIN_RIGHT)
    up = _Scale(1.08 * most or 1.0, height - _MARGIN_BOTTOM, _MARGIN_TOP)
    return Timeline(
        width,
        height,
        left=_MARGIN_LEFT,
        right=width - _MARGIN_RIGHT,
        top=_MARGIN_TOP,
        bottom=height - _MARGIN_BOTTOM,
        across=tuple(Tick(across.at(value), seconds_text(value)) for value in across.ticks(width // 100)),
        up=tuple(Tick(up.at(value), bytes_text(value)) for value in up.ticks(height // 60)),
        lines=tuple(_lines(curves, across, up)),
        models=tuple(sorted({up.at(load.final_bytes) for load in loads})),
    )


@dataclass(frozen=True)
class _Scale:
    """From 0 to ``most``, at ``first`` to ``last`` pixels."""

    most: float
    first: float
    last: float

    def at(self, value: float) -> float:
        # Memory may end below where it began: drawn on the axis.
        return round(self.first + (self.last - self.first) * max(value, 0.0) / self.most, 1)

    def ticks(self, about: int) -> list[float]:
        """Round values, some ``about`` of them."""
        rough = self.most / max(about, 1)
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * factor for factor in _STEPS if power * factor >= rough)
        return [step * index for index in range(int(self.most / step) + 1)]


def _lines(curves: Sequence[Curve], across: _Scale, up: _Scale) -> list[Line]:
    """The loads that stand out last, so that they are drawn over the others."""
    found = [
        _line(index, load, load is curve.highest, across, up)
        for index, curve in enumerate(curves)
        for load in curve.reports
        if load.memory.samples
    ]
    return sorted(found, key=lambda line: line.highest)


def _line(curve: int, load: LoadReport, highest: bool, across: _Scale, up: _Scale) -> Line:  # noqa: FBT001 - a fact
    samples = load.memory.samples
    points = " ".join(f"{across.at(second)},{up.at(above)}" for second, above in samples)
    second, above = max(samples, key=lambda sample: sample[1])
    return Line(curve, points, highest, (across.at(second), up.at(above)))
