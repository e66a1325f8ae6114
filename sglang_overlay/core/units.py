# SPDX-License-Identifier: Apache-2.0
"""Quantization units: the smallest slices of a parameter whose scale can be computed alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from sglang_overlay.core.regions import Box, Interval, whole


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
        """Units that a box of ``parameter_shape`` touches, and the box within each of them."""
        if self.sliced:
            return box[0], box[1:]
        return (0, 1), box
