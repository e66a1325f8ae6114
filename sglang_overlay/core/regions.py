# SPDX-License-Identifier: Apache-2.0
"""Regions of a parameter: axis-aligned boxes, and the box that a strided view of a contiguous tensor covers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import prod

import torch

from sglang_overlay.core.errors import UnsupportedWriteError

Interval = tuple[int, int]
"""Half-open ``(start, stop)``."""

Box = tuple[Interval, ...]
"""One interval per dimension."""


def whole(shape: Sequence[int]) -> Box:
    """The box of everything in ``shape``."""
    return tuple((0, size) for size in shape)


def extent(box: Box) -> tuple[int, ...]:
    """Sizes of a box."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Number of elements in a box."""
    return prod(extent(box))


def slices(box: Box) -> tuple[slice, ...]:
    """The index that selects the box from a tensor."""
    return tuple(slice(start, stop) for start, stop in box)


def intersection(one: Box, other: Box) -> Box | None:
    """The common box, or None where the two are disjoint."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return common if all(start < stop for start, stop in common) else None


def difference(box: Box, hole: Box) -> list[Box]:
    """Disjoint boxes that together cover ``box`` without ``hole``."""
    common = intersection(box, hole)
    if common is None:
        return [box]
    parts = []
    for axis, ((start, stop), (low, high)) in enumerate(zip(box, common, strict=True)):
        for interval in ((start, low), (high, stop)):
            if interval[0] < interval[1]:
                parts.append((*common[:axis], interval, *box[axis + 1 :]))
    return parts


def shifted(box: Box, origin: Box) -> Box:
    """``box`` counted from the start of ``origin`` instead of zero."""
    return tuple((start - low, stop - low) for (start, stop), (low, _) in zip(box, origin, strict=True))


class Placement:
    """Which box of a contiguous tensor a view covers, and how to reorder a tensor of the view's shape into the box.

    Args:
        view: any view made of narrows, selects, transposes and reshapes.
        shape: shape of the contiguous tensor that was viewed, which starts at storage offset 0.

    Raises:
        UnsupportedWriteError: the view is not a box of the tensor (a step, a diagonal, a reshape across a cut).
    """

    __slots__ = ("_parts", "_permutation", "box")

    def __init__(self, view: torch.Tensor, shape: torch.Size) -> None:
        strides = _contiguous_strides(shape)
        starts = _start(int(view.storage_offset()), strides)
        sizes = [1] * len(shape)
        axes: list[int] = []
        parts: list[int] = []
        for size, stride in zip(view.shape, view.stride(), strict=True):
            if size != 1:
                covered = _axes_of(size, stride, shape, strides, starts)
                for axis, length in covered:
                    sizes[axis] = length
                axes.extend(axis for axis, _ in covered)
                parts.extend(length for _, length in covered)
        if len(set(axes)) != len(axes):
            raise UnsupportedWriteError(f"view {_describe(view)} overlaps itself in {tuple(shape)}")
        self.box: Box = tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))
        self._parts = parts
        self._permutation = None if _is_sorted(axes) else sorted(range(len(axes)), key=axes.__getitem__)

    def lay_out(self, source: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """``source``, which has the view's shape, in the shape of the box, or in ``shape``, which may add or drop ones.

        A view of ``source`` where its strides allow that.
        """
        if self._permutation is not None:
            source = source.reshape(self._parts).permute(self._permutation)
        shape = extent(self.box) if shape is None else shape
        return source if source.shape == shape else source.reshape(shape)


def _contiguous_strides(shape: Sequence[int]) -> list[int]:
    strides = [1] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides


def _start(offset: int, strides: Sequence[int]) -> list[int]:
    starts = []
    for stride in strides:
        start, offset = divmod(offset, stride)
        starts.append(start)
    return starts


def _axes_of(
    size: int, stride: int, shape: Sequence[int], strides: Sequence[int], starts: Sequence[int]
) -> list[tuple[int, int]]:
    """The (axis, length) pairs, outermost first, that one dimension of a view covers."""
    axis = next((a for a in range(len(shape)) if strides[a] == stride and shape[a] > 1), None)
    covered: list[tuple[int, int]] = []
    while axis is not None and axis >= 0:
        if starts[axis] + size <= shape[axis]:
            return [(axis, size), *covered]
        if starts[axis] != 0 or size % shape[axis]:
            break
        covered.insert(0, (axis, shape[axis]))
        size //= shape[axis]
        axis -= 1
    raise UnsupportedWriteError(f"a dimension of size {size} and stride {stride} is no range of axes of {tuple(shape)}")


def _is_sorted(values: Iterable[int]) -> bool:
    return all(a < b for a, b in pairwise(values))


def _describe(view: torch.Tensor) -> str:
    return f"of shape {tuple(view.shape)}, stride {view.stride()}, offset {view.storage_offset()}"
