# SPDX-License-Identifier: Apache-2.0
"""Shared by schemes with one scale for each row of an expert's matrix."""

from __future__ import annotations

from math import gcd, prod

import torch

from sglang_overlay.core.units import UnitGrid
from sglang_overlay.schemes.rows_over_ranks import WholeRowScales
from sglang_overlay.schemes.serialized_plan import SerializedPlan

ROWS = 128
"""Rows quantized at once on a CPU, so that intermediates stay in cache; fewer if a size is not a multiple of it."""


class ExpertRowsPlan(WholeRowScales, SerializedPlan):
    """w13 ``[E, 2I, H]`` and w2 ``[E, H, I]`` with scales ``[E, 2I, 1]`` and ``[E, H, 1]``; units are runs of rows."""

    def __init__(self) -> None:
        super().__init__({"w13_weight": "w13_weight_scale", "w2_weight": "w2_weight_scale"})

    def grid(self, layer: torch.nn.Module, name: str, weight: torch.Tensor) -> UnitGrid:
        rows = projection_rows(layer, name, weight.shape[1])
        return grid_of_rows(tuple(weight.shape), gcd(rows, ROWS) if weight.is_cpu else rows)

    def whole_columns(self, layer: torch.nn.Module, name: str, columns: int) -> int:
        return columns * layer.moe_tp_size if name == "w2_weight" else columns  # type: ignore[operator,return-value]


def projection_rows(layer: torch.nn.Module, name: str, height: int) -> int:
    """Rows of an expert's matrix, of ``height`` rows, that come in one checkpoint tensor.

    gate_proj and up_proj fill w13, each with as many rows as the intermediate size. On a device each is one unit, which
    takes no more kernel launches than a unit of 128 rows.
    """
    intermediate: int = layer.intermediate_size_per_partition  # type: ignore[assignment]
    return height if name == "w2_weight" else gcd(intermediate, height)


def grid_of_rows(shape: tuple[int, ...], rows: int) -> UnitGrid:
    """A grid in which each block of ``rows`` rows, in every matrix of ``shape``, is a unit.

    Raises:
        ValueError: the matrices' height is not a multiple of ``rows``.
    """
    *matrices, height, width = shape
    if height % rows:
        raise ValueError(f"{height} rows do not divide into units of {rows}")
    return UnitGrid(count=prod(matrices) * height // rows, shape=(rows, width), sliced=True)
