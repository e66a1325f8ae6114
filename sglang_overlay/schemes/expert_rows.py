# SPDX-License-Identifier: Apache-2.0
"""Experts whose rows are quantized apart from each other: what the schemes that have such experts share."""

from __future__ import annotations

from math import gcd, prod

import torch

from sglang_overlay.core.units import UnitGrid
from sglang_overlay.schemes.rows_over_ranks import WholeRowScales
from sglang_overlay.schemes.serialized_plan import SerializedPlan

ROWS = 128
"""Rows quantized at once on a CPU, so that intermediates stay in cache; fewer where a size is no multiple."""


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
    """Rows of an expert's matrix, of ``height``, that come in one checkpoint tensor.

    w13 is filled by a gate_proj and an up_proj of intermediate size rows each. On a device each is a unit of its own:
    it takes as many launches as one of 128 rows.
    """
    intermediate: int = layer.intermediate_size_per_partition  # type: ignore[assignment]
    return height if name == "w2_weight" else gcd(intermediate, height)


def grid_of_rows(shape: tuple[int, ...], rows: int) -> UnitGrid:
    """Each block of ``rows`` rows is a unit, in every matrix of ``shape``; their height is a multiple of it."""
    *matrices, height, width = shape
    if height % rows:
        raise ValueError(f"{height} rows do not divide into units of {rows}")
    return UnitGrid(count=prod(matrices) * height // rows, shape=(rows, width), sliced=True)
