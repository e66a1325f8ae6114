# SPDX-License-Identifier: Apache-2.0
"""Piecewise quantization gives what SGLang's own functions give for the whole matrix, to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_overlay.core.staging import Piece
from sglang_overlay.cpu_reference import kernels
from sglang_overlay.cpu_reference.per_tensor import KernelArithmetic, PerTensorQuantizer, RatioArithmetic
from sglang_overlay.cpu_reference.quantizer import quantize_per_tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
SPECIAL = (0.0, -0.0, 1.0, -448.0, 1e-30, -1e-38, 3e38, float("inf"), float("-inf"), float("nan"), 2.0**-133)


def by_upstream(weight):
    """SGLang's ``input_to_float8``: what stock makes of linear weights."""
    from sglang.srt.layers.quantization.fp8_utils import input_to_float8

    return input_to_float8(weight, dtype=FP8)


@pytest.fixture(autouse=True, scope="module", params=["compiled", "torch"])
def loops(request):
    """The same with the compiled loops and without them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(kernels, "source", lambda values: None)
        yield


REFERENCES = {
    "linear": (RatioArithmetic(FP8_MAX), by_upstream),
    "experts": (KernelArithmetic(FP8_MAX), quantize_per_tensor),
}


def quantized(arithmetic, weight, cut):
    """Two pieces: rows up to ``cut``, and the others."""
    rows, columns = weight.shape
    parts = [(0, cut), (cut, rows)]
    pieces = [Piece(((low, high), (0, columns)), weight[low:high]) for low, high in parts if low < high]
    out, scale = torch.empty(weight.shape, dtype=FP8), torch.empty(1)
    PerTensorQuantizer(arithmetic).quantize(pieces, out, scale)
    return out, scale


def assert_equal(found, expected):
    assert torch.equal(found[0].view(torch.uint8), expected[0].contiguous().view(torch.uint8))
    assert torch.equal(found[1].view(torch.int32), expected[1].reshape(1).view(torch.int32))


@pytest.mark.parametrize("kind", REFERENCES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_matrix_and_cut_gives_upstreams_bits(kind, data):
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    magnitude = 2.0 ** data.draw(st.integers(-140, 120))
    weight = (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * magnitude).to(torch.bfloat16)
    for place in data.draw(st.lists(st.integers(0, rows * columns - 1), max_size=3)):
        weight.view(-1)[place] = data.draw(st.sampled_from(SPECIAL))
    arithmetic, reference = REFERENCES[kind]
    assert_equal(quantized(arithmetic, weight, data.draw(st.integers(0, rows))), reference(weight))


@pytest.mark.parametrize("kind", REFERENCES)
def test_matrix_of_many_chunks_gives_upstreams_bits(kind):
    weight = torch.randn(700, 1111, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    arithmetic, reference = REFERENCES[kind]
    assert_equal(quantized(arithmetic, weight, 333), reference(weight))


def factors_by_torch(kind, absmax):
    """What upstream multiplies by and stores, in its own order of operations."""
    if kind == "linear":
        multiplier = FP8_MAX / absmax.clamp(min=1e-12)
        return multiplier, multiplier.reciprocal()
    return (absmax / FP8_MAX).reciprocal(), absmax / FP8_MAX


@pytest.mark.parametrize("kind", REFERENCES)
def test_factors_of_every_bfloat16_have_torchs_bits(kind):
    absmax = torch.arange(0, 0x7F82, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    found = torch.tensor([REFERENCES[kind][0].factors(value) for value in absmax.tolist()], dtype=torch.float32)
    expected = torch.stack(factors_by_torch(kind, absmax), dim=1)
    assert torch.equal(found.nan_to_num(nan=-1.0).view(torch.int32), expected.nan_to_num(nan=-1.0).view(torch.int32))
