"""The per-tensor quantizer against the arithmetic of the CUDA kernel, written out in float64 where that is exact."""

from __future__ import annotations

import itertools
import struct

import pytest
import torch

from sglang_overlay.cpu_reference.quantizer import FP8, FP8_MAX, quantize_per_tensor, scaled_fp8_quant

#: All finite e4m3 values, from their bits: sign 1, exponent 4 (bias 7), mantissa 3.
E4M3 = sorted(
    {
        sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7))
        for sign, exponent, mantissa in itertools.product((1, -1), range(16), range(8))
        if (exponent, mantissa) != (15, 7)
    }
)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_scale_is_absmax_over_448_in_float32(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0.5, -3.0], [1.0, 2.0]], dtype=dtype)
    _, scale = quantize_per_tensor(tensor)
    assert scale.dtype == torch.float32
    assert scale.shape == (1,)
    assert scale.item() == float32(3.0 / 448.0)


@pytest.mark.parametrize("seed", range(4))
def test_values_are_the_nearest_fp8_of_the_float32_product(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = (torch.randn(33, 65, generator=generator) * 10 ** (seed - 2)).to(torch.bfloat16)
    quantized, scale = quantize_per_tensor(tensor)
    inverse = float32(1.0 / scale.item())
    products = (tensor.double() * inverse).float().double()
    codes = torch.tensor(E4M3, dtype=torch.float64)
    distance = (products.flatten()[:, None] - codes).abs()
    error = (products - quantized.double()).abs().flatten()
    assert torch.equal(error, distance.min(dim=1).values)


def test_ties_round_to_even() -> None:
    # A largest value of 448 makes the scale 1; 17 and 19 lie half-way between e4m3 values 16, 18 and 20.
    quantized, _ = quantize_per_tensor(torch.tensor([[448.0, 17.0, 19.0, -17.0]]))
    assert quantized.float().tolist() == [[448.0, 16.0, 20.0, -16.0]]


def test_values_are_multiplied_by_the_reciprocal_not_divided() -> None:
    # 0.80859375 / scale is 336, half-way between 320 and 352; times the rounded reciprocal it is a little more.
    quantized, _ = quantize_per_tensor(torch.tensor([[1.078125, 0.80859375]], dtype=torch.bfloat16))
    assert quantized.float().tolist() == [[448.0, 352.0]]


def test_all_zero_tensor_dequantizes_to_zero() -> None:
    quantized, scale = quantize_per_tensor(torch.zeros(8, 16, dtype=torch.bfloat16))
    assert scale.item() == 0.0
    assert torch.equal(quantized.float(), torch.full((8, 16), FP8_MAX)), "fminf(NaN, 448) is 448 in the CUDA kernel"
    assert torch.equal(quantized.float() * scale, torch.zeros(8, 16))


def test_given_scale_saturates_instead_of_overflowing() -> None:
    quantized, scale = quantize_per_tensor(torch.tensor([[1e6, -1e6, 1.0]]), torch.tensor([0.5]))
    assert quantized.float().tolist() == [[448.0, -448.0, 2.0]]
    assert scale.tolist() == [0.5]


def test_nan_does_not_reach_the_scale() -> None:
    quantized, scale = quantize_per_tensor(torch.tensor([[float("nan"), 448.0]]))
    assert scale.item() == 1.0
    assert quantized.float().tolist() == [[448.0, 448.0]]


def test_a_strided_slice_gives_what_its_copy_gives() -> None:
    tensor = torch.randn(16, 32).to(torch.bfloat16).t()
    quantized, scale = scaled_fp8_quant(tensor)
    expected, expected_scale = scaled_fp8_quant(tensor.contiguous())
    assert torch.equal(bytes_of(quantized), bytes_of(expected))
    assert torch.equal(scale, expected_scale)
    assert quantized.dtype == FP8
    assert quantized.is_contiguous()


def test_activation_quantization_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="weights, not activations"):
        scaled_fp8_quant(torch.ones(2, 2), num_token_padding=17)
    with pytest.raises(NotImplementedError, match="weights, not activations"):
        scaled_fp8_quant(torch.ones(2, 2), use_per_token_if_dynamic=True)
