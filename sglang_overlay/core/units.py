# SPDX-License-Identifier: Apache-2.0
"""Quantization units, the slices of a parameter that are quantized in one step, and which of them a write touches.

A unit is whole rows, or an expert's matrix, and holds all values of each of its scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from sglang_overlay.core.regions import Box, Interval, Placement, extent, volume, whole


@dataclass(frozen=True)
class UnitGrid:
    """How a parameter divides into units.

    Attributes:
        count: number of units.
        shape: shape of one unit, for example ``(2 * intermediate, hidden)`` for an expert's w13.
        sliced: whether units lie one after the other along the first dimension (experts, output channels, blocks of
            rows); otherwise the parameter is one unit.
    """

    count: int
    shape: tuple[int, ...]
    sliced: bool

    @classmethod
    def per_slice(cls, shape: tuple[int, ...]) -> UnitGrid:
        """Each index of the first dimension is a unit."""
        return cls(count=shape[0], shape=tuple(shape[1:]), sliced=True)

    @classmethod
    def one(cls, shape: tuple[int, ...]) -> UnitGrid:
        """The whole parameter is one unit."""
        return cls(count=1, shape=tuple(shape), sliced=False)

    @cached_property
    def parameter_shape(self) -> tuple[int, ...]:
        """The parameter's shape, with its units along the first dimension where it is sliced."""
        return (self.count, *self.shape) if self.sliced else self.shape

    @cached_property
    def unit_volume(self) -> int:
        """Elements in one unit."""
        return prod(self.shape)

    @cached_property
    def full(self) -> Box:
        """The box of a whole unit."""
        return whole(self.shape)

    def divide(self, box: Box) -> tuple[Interval, Box]:
        """The units that a box of ``parameter_shape`` touches, and the box within each of them."""
        if self.sliced:
            return box[0], box[1:]
        return (0, 1), box


class TargetRegion:
    """Where views of one form lie: the same box in each of ``count`` consecutive units.

    Attributes:
        count: number of units.
        box: the box within each unit.
        is_whole: whether the box is the whole unit.
    """

    __slots__ = ("_placement", "_shape", "box", "count", "is_whole")

    def __init__(self, placement: Placement, grid: UnitGrid) -> None:
        (first, last), self.box = grid.divide(placement.box)
        self.count = last - first
        self.is_whole = volume(self.box) == grid.unit_volume
        self._placement = placement
        self._shape = extent(self.box) if self.count == 1 else (self.count, *extent(self.box))

    def lay_out(self, source: torch.Tensor) -> torch.Tensor:
        """``source``, which has the view's shape, as ``[*box]`` for one unit or ``[count, *box]`` for several."""
        return self._placement.lay_out(source, self._shape)


class TargetRegions:
    """Finds the ``TargetRegion`` of each view of one parameter. Thread-safe.

    Views that differ only in the unit they begin in, as those of experts do, share a ``TargetRegion``, which is
    computed once. Two threads that meet a new form at the same time both compute it, with the same result.
    """

    def __init__(self, grid: UnitGrid) -> None:
        self._grid = grid
        self._shape = torch.Size(grid.parameter_shape)
        self._known: dict[tuple[int, torch.Size, tuple[int, ...]], TargetRegion] = {}

    def of(self, view: torch.Tensor) -> tuple[int, TargetRegion]:
        """The first unit that ``view`` touches, and its region from there.

        Raises:
            UnsupportedWriteError: as ``Placement``.
        """
        unit, rest = divmod(int(view.storage_offset()), self._grid.unit_volume)
        form = (rest, view.shape, view.stride())
        region = self._known.get(form)
        if region is None:
            region = self._known[form] = TargetRegion(Placement(view, self._shape), self._grid)
        return unit, region
