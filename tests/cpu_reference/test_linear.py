"""fp8 linear layers against the same layer in float64."""

from __future__ import annotations

import pytest
import torch

from sglang_overlay.cpu_reference.linear import apply_fp8_linear, dequantize
from sglang_overlay.cpu_reference.quantizer import quantize_per_tensor

K, N = 96, 40


def make_layer(dtype: torch.dtype, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    rows = torch.logspace(-2, 1, N).unsqueeze(1)
    weight, scale = quantize_per_tensor(torch.randn(N, K, generator=generator) * rows)
    return torch.randn(7, K, generator=generator).to(dtype), weight.t(), scale.reshape(())


def bound(dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rounding of each weight and of the result to ``dtype``, of float32 sums over K: relative to sum |x||w|."""
    unit = torch.finfo(dtype).eps / 2
    return (2 * unit + K * torch.finfo(torch.float32).eps) * (x.double().abs() @ weight.abs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_matches_float64(dtype: torch.dtype) -> None:
    x, weight, scale = make_layer(dtype, torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, N).to(dtype)
    exact_weight = weight.double() * scale.double()
    exact = x.double() @ exact_weight + bias.double()
    output = apply_fp8_linear(input=x, weight=weight, weight_scale=scale, input_scale=None, bias=bias)
    assert output.dtype == dtype
    assert ((output.double() - exact).abs() <= bound(dtype, x, exact_weight) + exact.abs() * 2**-8).all()


@pytest.mark.parametrize("shape", [(N,), (1, N), (N, 1)])
def test_per_channel_scales_belong_to_output_channels(shape: tuple[int, ...]) -> None:
    x, weight, _ = make_layer(torch.float32, torch.Generator().manual_seed(1))
    scales = torch.logspace(-3, 0, N)
    exact_weight = weight.double() * scales.double()
    output = apply_fp8_linear(x, weight, scales.reshape(shape))
    assert ((output.double() - x.double() @ exact_weight).abs() <= bound(torch.float32, x, exact_weight)).all()


def test_leading_dimensions_are_kept() -> None:
    x, weight, scale = make_layer(torch.bfloat16, torch.Generator().manual_seed(2))
    assert apply_fp8_linear(x.reshape(1, 7, K), weight, scale).shape == (1, 7, N)
    assert apply_fp8_linear(x[:0], weight, scale).shape == (0, N)


def test_switches_between_gpu_kernels_change_nothing() -> None:
    x, weight, scale = make_layer(torch.bfloat16, torch.Generator().manual_seed(3))
    plain = apply_fp8_linear(x, weight, scale)
    assert torch.equal(plain, apply_fp8_linear(x, weight, scale, cutlass_fp8_supported=True, pad_output=True))


def test_fp8_activation_is_refused() -> None:
    x, weight, scale = make_layer(torch.bfloat16, torch.Generator().manual_seed(4))
    with pytest.raises(NotImplementedError, match="activations in the model's dtype"):
        apply_fp8_linear(x.to(torch.float8_e4m3fn), weight, scale)


def test_dequantized_weight_is_rounded_once() -> None:
    weight = torch.tensor([[1.125, 448.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([0.3])
    expected = (weight.double() * scale.double()).float().to(torch.bfloat16)
    assert torch.equal(dequantize(weight, scale, torch.bfloat16), expected)
