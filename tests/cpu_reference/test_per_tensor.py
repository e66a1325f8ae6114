# SPDX-License-Identifier: Apache-2.0
"""Quantizing on the CPU: scales whatever the default dtype, which is the model's while SGLang loads one, and NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from core.kernels import RowKernel
from core.streams import same_bytes

from sglang_overlay.core.quantizers import RowQuantizer
from sglang_overlay.core.staging import Piece
from sglang_overlay.cpu_reference.per_tensor import (
    KernelArithmetic,
    PerTensorQuantizer,
    RatioArithmetic,
)
from sglang_overlay.schemes.arithmetic import quantize_rows, quantize_rows_as_groups

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max

QUANTIZERS = {
    "per channel": (RowQuantizer(lambda rows: quantize_rows(rows, FP8)), (3, 64)),
    "per tensor, as a ratio": (PerTensorQuantizer(RatioArithmetic(FP8_MAX)), (3,)),
    "per tensor, as the kernel": (PerTensorQuantizer(KernelArithmetic(FP8_MAX)), (3,)),
}


@pytest.fixture
def bfloat16_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_scales_are_those_of_float32(kind, bfloat16_by_default):
    quantizer, scales = QUANTIZERS[kind]
    values = torch.randn(3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight, scale = torch.empty(values.shape, dtype=FP8), torch.empty(scales, dtype=torch.float32)
    found = quantizer.quantize_run(values, weight, scale)
    dims = (-1,) if len(scales) == 2 else (-1, -2)
    wanted = values.double().abs().amax(dims) / FP8_MAX
    torch.testing.assert_close(scale.double(), wanted, rtol=2e-7, atol=0)
    torch.testing.assert_close(found, values.abs().amax((-1, -2)).float(), rtol=0, atol=0, check_dtype=False)


def test_rows_are_rounded_by_their_float32_scale(bfloat16_by_default):
    rows = torch.randn(8, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    values, scales = quantize_rows(rows, FP8)
    assert scales.dtype == torch.float32
    step = (values.double() * scales.double() - rows.double()).abs() / rows.double().abs().clamp(min=1e-3)
    assert float(step.max()) <= 2**-4


@pytest.mark.parametrize("exponent", [-140, -130, -120, -20, 0, 60, 126])
@pytest.mark.parametrize("special", [None, 0.0, -0.0, math.nan, math.inf, 2.0**-133])
def test_rows_have_the_bits_of_the_cuda_kernel(exponent, special):
    """Of the one that takes many rows: the other one leaves 448 in rows of zeros."""
    rows = torch.randn(64, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) * 2.0**exponent
    rows = rows.to(torch.bfloat16)
    rows[::9] = 0.0
    if special is not None:
        rows[::7, 3] = special
    found, expected = quantize_rows(rows, FP8), RowKernel(multiprocessors=0)(rows, 256)
    assert same_bytes(found[1], expected[1])
    ordinary = expected[1].view(-1) != 0
    assert same_bytes(found[0][ordinary], expected[0][ordinary])
    assert not found[0][~ordinary].view(torch.uint8).any()


@pytest.mark.parametrize("quantize", [quantize_rows, quantize_rows_as_groups])
def test_rows_in_float32_stay_as_they_are(quantize):
    rows = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    before = rows.clone()
    quantize(rows, FP8)
    assert torch.equal(rows, before)


@pytest.mark.parametrize("arithmetic", [RatioArithmetic, KernelArithmetic])
@pytest.mark.parametrize("damaged", [0, 1])
def test_nan_in_any_piece_is_found(arithmetic, damaged):
    values = torch.ones(4, 64, dtype=torch.bfloat16)
    values[2 * damaged, 7] = torch.nan
    pieces = [Piece(((0, 2), (0, 64)), values[:2]), Piece(((2, 4), (0, 64)), values[2:])]
    weight, scale = torch.empty(4, 64, dtype=FP8), torch.empty((), dtype=torch.float32)
    assert math.isnan(PerTensorQuantizer(arithmetic(FP8_MAX)).quantize(pieces, weight, scale))
