# SPDX-License-Identifier: Apache-2.0
"""Lay out memory over time as lines on a page: where samples and axis labels go. Needs no drawing library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sglang_overlay.observe.chart import Curve
from sglang_overlay.observe.report import LoadReport

_MARGIN_LEFT, _MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 64, 14, 12, 44
_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in pixels, and its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One load's memory.

    ``points`` is for SVG's ``polyline``; ``highest`` is true for the load with its curve's highest peak; ``peak`` is
    where this line is highest, in pixels.
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
    """Heights at which a load without overhead would end."""


def timeline(curves: Sequence[Curve], width: int, height: int) -> Timeline | None:
    """Lay out the curves; None if there are no samples."""
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
        across=_ticks(across, width // 90, *_time_unit(across.most)),
        up=_ticks(up, height // 60, *_byte_unit(up.most)),
        lines=tuple(_lines(curves, across, up)),
        models=tuple(sorted({up.at(load.final_bytes) for load in loads})),
    )


@dataclass(frozen=True)
class _Scale:
    """Maps values from 0 to ``most`` to pixels from ``first`` to ``last``."""

    most: float
    first: float
    last: float

    def at(self, value: float) -> float:
        # Memory may end below its start: then it is drawn on the axis.
        return round(self.first + (self.last - self.first) * max(value, 0.0) / self.most, 1)


def _ticks(scale: _Scale, most: int, size: float, unit: str) -> tuple[Tick, ...]:
    """Up to ``most`` ticks, and one at 0, at round numbers of a unit of this size."""
    rough = scale.most / size / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in _STEPS if power * factor >= rough)
    values = [step * index for index in range(int(scale.most / size / step) + 1)]
    return tuple(Tick(scale.at(value * size), f"{value:g} {unit}" if value else "0") for value in values)


def _time_unit(longest: float) -> tuple[float, str]:
    return (60.0, "min") if longest > 180 else (1.0, "s") if longest > 1 else (1e-3, "ms")


def _byte_unit(most: float) -> tuple[float, str]:
    return next(
        ((1000.0**power, unit) for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")) if most >= 1000.0**power),
        (1.0, "B"),
    )


def _lines(curves: Sequence[Curve], across: _Scale, up: _Scale) -> list[Line]:
    """One line per load; highlighted loads come last, so that they are drawn over the others."""
    found = [
        _line(index, load, load is curve.highest, across, up)
        for index, curve in enumerate(curves)
        for load in curve.drawn
        if load.memory.samples
    ]
    return sorted(found, key=lambda line: line.highest)


def _line(curve: int, load: LoadReport, highest: bool, across: _Scale, up: _Scale) -> Line:  # noqa: FBT001 - a fact
    samples = load.memory.samples
    points = " ".join(f"{across.at(second)},{up.at(above)}" for second, above in samples)
    second, above = max(samples, key=lambda sample: sample[1])
    return Line(curve, points, highest, (across.at(second), up.at(above)))
