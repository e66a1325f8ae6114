# SPDX-License-Identifier: Apache-2.0
"""Experts with one scale an output channel: what the schemes that have such experts share."""

from __future__ import annotations

from math import gcd, prod

import torch

from sglang_overlay.core.units import UnitGrid
from sglang_overlay.upstream.updatable_plan import SerializedPlan

ROWS = 128
"""Rows that are quantized at once; fewer where a size is no multiple."""


class ExpertRowsPlan(SerializedPlan):
    """w13 ``[E, 2I, H]`` and w2 ``[E, H, I]`` with scales ``[E, 2I, 1]`` and ``[E, H, 1]``; units are runs of rows."""

    def __init__(self) -> None:
        super().__init__({"w13_weight": "w13_weight_scale", "w2_weight": "w2_weight_scale"})

    def grid(self, layer: torch.nn.Module, shape: tuple[int, ...]) -> UnitGrid:
        # A gate_proj and an up_proj of intermediate size rows each are written into one w13.
        intermediate: int = layer.intermediate_size_per_partition  # type: ignore[assignment]
        return grid_of_rows(shape, gcd(intermediate, shape[1], ROWS))


def grid_of_rows(shape: tuple[int, ...], rows: int) -> UnitGrid:
    """Each block of ``rows`` rows is a unit, in every matrix of ``shape``; their height is a multiple of it."""
    *matrices, height, width = shape
    if height % rows:
        raise ValueError(f"{height} rows do not divide into units of {rows}")
    return UnitGrid(count=prod(matrices) * height // rows, shape=(rows, width), sliced=True)
