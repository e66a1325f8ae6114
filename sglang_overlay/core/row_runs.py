# SPDX-License-Identifier: Apache-2.0
"""Split a view that is no box of units into parts that are.

A run of rows that begins or ends within a unit occurs where upstream has padded a projection and its loader writes less
than all of it; a view of several experts, where each expert has several units.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from sglang_overlay.core.errors import UnsupportedWriteError
from sglang_overlay.core.units import UnitGrid


def split(
    grid: UnitGrid, view: torch.Tensor, source: torch.Tensor, refused: UnsupportedWriteError
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split a view that is not a box, and the ``source`` written to it, into parts that are boxes, or splittable.

    Raises:
        UnsupportedWriteError: ``refused``, if that is impossible.
    """
    if view.ndim > 2:
        return [*zip(view.unbind(), source.unbind(), strict=True)]
    runs = _runs(grid, view)
    if len(runs) < 2:
        raise refused
    return [(view[run], source[run]) for run in runs]


def _runs(grid: UnitGrid, view: torch.Tensor) -> list[slice]:
    """Parts of a run of rows; empty for other views."""
    if not grid.sliced or len(grid.shape) != 2 or view.ndim != 2 or view.stride() != (grid.shape[1], 1):
        return []
    height, rows = grid.shape[0], len(view)
    before = int(view.storage_offset()) // grid.shape[1] % height
    head = min((height - before) % height, rows)
    whole_units = head + (rows - head) // height * height
    cuts = sorted({0, head, whole_units, rows})
    return [slice(start, stop) for start, stop in pairwise(cuts)]
