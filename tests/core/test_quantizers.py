# SPDX-License-Identifier: Apache-2.0
"""Units through upstream's kernels: whichever pieces come, what the kernel makes of the whole weight."""

from __future__ import annotations

import math

import pytest
import torch

from core.kernels import FP8, RowKernel, RowKernelInPlace, scaled_fp8_quant
from core.operations import operations
from core.streams import same_bytes, streamed
from sglang_overlay.core.quantizers import (
    RowKernelQuantizer,
    RowQuantizer,
    ShuffledUnits,
    WholeUnitQuantizer,
    is_rounding_of,
    magnitude,
    magnitudes,
    units_not_finite,
)
from sglang_overlay.core.staging import Piece
from sglang_overlay.core.units import UnitGrid

KERNELS = {"two results": RowKernel, "in place": RowKernelInPlace}


def rows_of_all_kinds(rows, columns):
    """Ordinary rows, and every eighth: zeros, negative zeros, both, NaN among zeros, tiny, Inf."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight[0::8] = 0.0
    weight[1::8] = -0.0
    weight[2::8] = torch.tensor([0.0, -0.0], dtype=torch.bfloat16).repeat(columns // 2)
    weight[3::8] = 0.0
    weight[3::8, 3] = torch.nan
    weight[4::8] *= 2.0**-130
    weight[5::8, 1] = torch.inf
    return weight


@pytest.mark.parametrize("columns", [64, 24, 20])
@pytest.mark.parametrize("rows", [32, 2111, 2112, 2200])
@pytest.mark.parametrize("kind", KERNELS)
def test_rows_in_pieces_have_the_bits_of_the_whole_weight(kind, rows, columns):
    weight = rows_of_all_kinds(rows, columns)
    grid = UnitGrid.per_slice(tuple(weight.shape))
    found = streamed(weight.shape, grid, RowKernelQuantizer(KERNELS[kind](), rows), (rows,))
    with found.capture():
        for first, last in ((0, 16), (16, rows - 8), (rows - 8, rows)):
            found.placeholder.data[first:last].copy_(weight[first:last])
    assert found.stream.settle() == []
    values, scales = KERNELS[kind]()(weight, columns)
    assert same_bytes(found.stream.storage.weight, values)
    assert same_bytes(found.stream.storage.scale, scales.view(-1))


def test_whole_weight_is_one_call_and_nothing_is_redone():
    weight, kernel = rows_of_all_kinds(64, 32), RowKernelInPlace()
    out, scale = torch.empty(64, 32, dtype=FP8), torch.empty(64)
    quantizer = RowKernelQuantizer(kernel, 64)
    quantizer.quantize_run(weight, out, scale)
    assert kernel.calls == [(64, 32)]
    assert quantizer._zeros_stay is None


def test_results_are_written_in_place_where_upstream_offers_it():
    class Noting(RowKernelInPlace):
        def run(self, x, group_size, q, s):
            addresses.append((q.data_ptr(), s.data_ptr()))
            super().run(x, group_size, q, s)

    addresses: list[tuple[int, int]] = []
    out, scale = torch.empty(8, 32, dtype=FP8), torch.empty(8)
    RowKernelQuantizer(Noting(), 8).quantize_run(torch.ones(8, 32).bfloat16(), out, scale)
    assert addresses == [(out.data_ptr(), scale.data_ptr())]


def bucket_view(shape, first):
    """A matrix that begins ``first`` bytes into a flattened bucket."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    bucket = torch.zeros(first + values.nbytes + 16, dtype=torch.uint8)
    start = -bucket.data_ptr() % 16 + first
    view = bucket[start : start + values.nbytes].view(torch.bfloat16).view(shape)
    return view.copy_(values)


QUANTIZERS = {
    "rows": (lambda rows: RowKernelQuantizer(RowKernel(), rows), (12,)),
    "rows in place": (lambda rows: RowKernelQuantizer(RowKernelInPlace(), rows), (12,)),
    "whole unit": (lambda rows: WholeUnitQuantizer(scaled_fp8_quant), (1,)),
}


@pytest.mark.parametrize("kind", QUANTIZERS)
@pytest.mark.parametrize("first", [0, 2, 6, 8, 10])
def test_source_at_any_address_of_a_bucket_is_taken(kind, first):
    make, scales = QUANTIZERS[kind]
    source = bucket_view((12, 40), first)
    assert source.data_ptr() % 16 == first
    grid = UnitGrid.per_slice((12, 40)) if scales == (12,) else UnitGrid.one((12, 40))
    found = streamed((12, 40), grid, make(12), scales)
    with found.capture():
        found.placeholder.data.copy_(source)
    assert found.stream.settle() == []
    aligned = source.clone()
    wanted = RowKernel()(aligned, 40) if scales == (12,) else scaled_fp8_quant(aligned)
    assert same_bytes(found.stream.storage.weight.view(12, 40), wanted[0])
    assert same_bytes(found.stream.storage.scale.view(-1), wanted[1].view(-1))


def test_aligned_source_is_not_copied():
    seen = operations(lambda: WholeUnitQuantizer(lambda unit: (unit.to(FP8), unit.sum())).quantize_run(*_one_unit()))
    assert not [name for name in seen.seen if "clone" in name]


def _one_unit():
    return torch.ones(1, 8, 16).bfloat16(), torch.empty(1, 8, 16, dtype=FP8), torch.empty(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1.0, -3.0, 2.0], 3.0),
        ([-0.0, -0.0], 0.0),
        ([1.0, math.nan, 2.0], math.nan),
        ([math.inf, math.nan], math.nan),
        ([1.0, -math.inf], math.inf),
    ],
)
def test_magnitude_keeps_what_is_not_finite(dtype, values, wanted):
    unit = torch.zeros(1, 300, dtype=dtype)
    unit[0, 123 : 123 + len(values)] = torch.tensor(values)
    # What a device computes, on the CPU.
    norm = torch.linalg.vector_norm(unit, torch.inf, dim=(1,))
    for found in (magnitude(unit), magnitudes(unit.view(1, 1, 300))[0], norm[0]):
        assert found.item() == pytest.approx(wanted, nan_ok=True)


def test_magnitude_of_a_single_number():
    assert magnitude(torch.tensor(-3.0)).item() == 3.0
    assert units_not_finite([magnitude(torch.tensor(math.nan)).view(1), torch.ones(2)]) == [[0], []]


def test_run_is_cut_where_it_would_take_too_much_memory(monkeypatch):
    sizes = []

    def function(rows):
        sizes.append(len(rows))
        return rows.to(FP8), torch.ones(len(rows), 1)

    monkeypatch.setattr(RowQuantizer, "at_once", 64)
    values = torch.randn(10, 4, 8).bfloat16()
    out, scale = torch.empty(values.shape, dtype=FP8), torch.empty(10, 4)
    found = RowQuantizer(function).quantize_run(values, out, scale)
    assert sizes == [8, 8, 8, 8, 8]
    assert torch.equal(found, values.abs().amax((1, 2)))
    assert same_bytes(out, values.to(FP8))


def test_shuffled_units_hold_what_their_kernel_reads_and_know_it_again():
    def by_columns(weight):
        return weight.mT.reshape(weight.shape)

    def by_rows(weight):
        return weight.reshape(*weight.shape[:-2], weight.shape[-1], weight.shape[-2]).mT.contiguous()

    values = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain, shuffled = (torch.empty(values.shape, dtype=FP8) for _ in range(2))
    scale, scales = (torch.empty(3, dtype=torch.float32) for _ in range(2))
    quantizer = WholeUnitQuantizer(scaled_fp8_quant)
    units = ShuffledUnits(quantizer, by_columns, by_rows)
    assert same_bytes(units.quantize_run(values, shuffled, scales), quantizer.quantize_run(values, plain, scale))
    assert same_bytes(shuffled, by_columns(plain))
    assert same_bytes(scales, scale)
    piece = Piece(((4, 9), (0, 32)), values[1, 4:9])
    assert units.could_be(piece, shuffled[1], scales[1])
    assert not units.could_be(Piece(piece.box, piece.values + 1), shuffled[1], scales[1])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_rounding_is_told_by_the_step_of_the_dtype(dtype):
    values, scale = torch.linspace(-300, 300, 10_000), torch.tensor(0.7)
    rounded = (values / scale).to(dtype)
    assert is_rounding_of(rounded, scale, values)
    assert not is_rounding_of(rounded, scale, values * 1.3)
