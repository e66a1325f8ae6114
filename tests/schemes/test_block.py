# SPDX-License-Identifier: Apache-2.0
"""Block-wise values and scales against float64, and unit by unit against all at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from core.streams import same_bytes, streamed
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_overlay.core.regions import whole
from sglang_overlay.core.staging import Piece
from sglang_overlay.schemes.block import BLOCK_SIZE, BlockPlan, BlockQuantizer
from sglang_overlay.schemes.expert_rows import grid_of_rows
from sglang_overlay.schemes.scheme import LayerKind

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
QUANTIZER = BlockQuantizer()


def blocks_of(rows, columns):
    return -(-rows // BLOCK_SIZE), -(-columns // BLOCK_SIZE)


def quantized(values):
    """One unit, by the quantizer."""
    weight, scale = torch.empty(values.shape, dtype=FP8), torch.empty(blocks_of(*values.shape))
    QUANTIZER.quantize([Piece(whole(values.shape), values)], weight, scale.view(-1))
    return weight, scale


def random_values(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-6, 3, rows).unsqueeze(1)
    return (torch.randn(rows, columns, generator=generator) * sizes).bfloat16()


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (200, 130), (1, 1), (129, 128)])
def test_scales_and_values_agree_with_float64(shape):
    values = random_values(*shape)
    weight, scale = quantized(values)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            box = (slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128))
            exact = values[box].double()
            wanted = exact.abs().max() / FP8_MAX
            assert scale[row, column].double() == pytest.approx(float(wanted), rel=1e-6)
            step = torch.maximum(exact.abs() / wanted, torch.tensor(2.0**-6, dtype=torch.float64)) * 2**-4
            assert ((weight[box].double() - exact / wanted).abs() <= step * (1 + 1e-5)).all()


def test_zeros_stay_zeros_with_a_finite_scale():
    weight, scale = quantized(torch.zeros(128, 256, dtype=torch.bfloat16))
    assert not weight.float().any()
    assert (scale > 0).all()


def test_nan_is_told():
    values = random_values(128, 256)
    values[5, 200] = torch.nan
    weight, scale = torch.empty(128, 256, dtype=FP8), torch.empty(2)
    magnitude = QUANTIZER.quantize([Piece(whole(values.shape), values)], weight, scale)
    assert torch.isnan(magnitude)
    assert not torch.isnan(scale[0])


@pytest.mark.parametrize(("intermediate", "units"), [(256, (8, (128, 384))), (192, (2, (384, 384)))])
def test_gate_that_ends_inside_a_block_makes_the_matrix_one_unit(intermediate, units):
    layer = torch.nn.Module()
    layer.intermediate_size_per_partition = intermediate
    grid = BlockPlan(LayerKind.EXPERTS).grid(layer, "w13_weight", torch.empty(2, 2 * intermediate, 384, dtype=FP8))
    assert (grid.count, grid.shape) == units


@pytest.mark.parametrize("box", [((0, 128), (0, 300)), ((5, 9), (100, 290))])
def test_own_values_could_be_and_others_could_not(box):
    values = random_values(128, 300)
    weight, scale = quantized(values)
    cut = tuple(slice(*interval) for interval in box)
    assert QUANTIZER.could_be(Piece(box, values[cut]), weight, scale.view(-1))
    other = values[cut].clone()
    other[2, 150] += 100
    assert not QUANTIZER.could_be(Piece(box, other), weight, scale.view(-1))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_units_of_any_order_and_split_equal_the_whole(data):
    rows, columns = 128 * data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)) * 64
    values = random_values(rows, columns, data.draw(st.integers(0, 99)))
    cuts = sorted({0, rows, *data.draw(st.lists(st.integers(1, rows - 1), max_size=6))})
    parts = data.draw(st.permutations(list(pairwise(cuts))))
    grid = grid_of_rows((rows, columns), BLOCK_SIZE)
    found = streamed((rows, columns), grid, QUANTIZER, (grid.count, blocks_of(1, columns)[1]))
    aligned = all(cut % BLOCK_SIZE == 0 for cut in cuts)
    with found.capture():
        for start, stop in parts if aligned else [(0, rows)]:
            found.placeholder.data[start:stop].copy_(values[start:stop])
    found.stream.settle()
    weight, scale = quantized(values)
    assert same_bytes(found.stream.storage.weight.view(rows, columns), weight)
    assert same_bytes(found.stream.storage.scale.view(-1), scale.view(-1))
