# SPDX-License-Identifier: Apache-2.0
"""MXFP8 on the CPU against the OCP format's own arithmetic, written out in float64, where all of it is exact."""

from __future__ import annotations

import pytest
import torch

from sglang_overlay.cpu_reference import moe, mxfp8
from sglang_overlay.cpu_reference.mxfp8 import GROUP, dequantize_groups, mxfp8_group_quantize

INF, NAN = float("inf"), float("nan")
NAN_BYTE = 0x7F
LARGEST = 0.875, 9
"""448, the largest e4m3 value, as a fraction and a power of two."""


def exact_exponents(values: torch.Tensor) -> torch.Tensor:
    """Biased exponents of the least powers of two that bring each group (last dimension, float64) to 448 or less."""
    fraction, power = torch.frexp(values.abs().amax(-1))
    least = power - LARGEST[1] + (fraction > LARGEST[0]).int()
    # Bytes below 1 are for zeros: 2 ** -126 is the smallest normal float32.
    return torch.where(fraction == 0, 0, least.clamp(min=-126) + 127)


def nearest_e4m3(values: torch.Tensor) -> torch.Tensor:
    """float64 values up to 448, rounded to e4m3: 3 bits behind the point, exponents from -6; ties to even."""
    _, power = torch.frexp(values)
    step = torch.ldexp(torch.ones_like(values), (power - 1).clamp(min=-6) - 3)
    return (values / step).round() * step


def in_float64(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a matrix becomes: e4m3 values in float64, and biased exponents."""
    groups = values.double().view(len(values), -1, GROUP)
    exponents = exact_exponents(groups)
    powers = torch.ldexp(torch.ones_like(groups[..., 0]), exponents - 127).unsqueeze(-1)
    return nearest_e4m3(groups / powers).view(values.shape), exponents


def every_bf16() -> torch.Tensor:
    """All finite bf16 values, subnormal ones and zeros as well, in order of their bits."""
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    return values[values.isfinite()]


def below(largest: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A group for each element of ``largest``, of which the others are smaller."""
    parts = torch.rand(len(largest), GROUP, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    groups = (parts * largest.float().unsqueeze(1)).to(largest.dtype)
    groups[torch.arange(len(largest)), torch.arange(len(largest)) % GROUP] = largest
    return groups


def assert_as_in_float64(values: torch.Tensor) -> None:
    quantized, exponents = mxfp8_group_quantize(values)
    exact, exact_bytes = in_float64(values)
    assert quantized.dtype == torch.float8_e4m3fn
    assert exponents.dtype == torch.uint8
    assert torch.equal(exponents.int(), exact_bytes.int())
    assert torch.equal(quantized.double(), exact)


def test_every_bf16_value_as_the_largest_of_its_group() -> None:
    assert_as_in_float64(below(every_bf16()))


def test_every_bf16_value_among_its_neighbours() -> None:
    values = every_bf16()
    assert_as_in_float64(values[: len(values) // GROUP * GROUP].view(-1, 2 * GROUP))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_random_weights_of_any_size(dtype: torch.dtype) -> None:
    sizes = torch.logspace(-4, 4, 300).unsqueeze(1)
    assert_as_in_float64((torch.randn(300, 3 * GROUP, generator=torch.Generator().manual_seed(1)) * sizes).to(dtype))


def test_448_needs_no_smaller_scale_than_449() -> None:
    values = torch.zeros(2, GROUP)
    values[0, 3], values[1, 3] = 448.0, 449.0
    quantized, exponents = mxfp8_group_quantize(values)
    assert exponents.flatten().tolist() == [127, 128]
    assert quantized[:, 3].tolist() == [448.0, 224.0]


def test_zeros_stay_zeros() -> None:
    quantized, exponents = mxfp8_group_quantize(torch.zeros(3, GROUP, dtype=torch.bfloat16))
    assert not exponents.any()
    assert not quantized.view(torch.uint8).any()
    assert not dequantize_groups(quantized, exponents, torch.float32).any()


def test_group_with_inf_is_nan_in_its_place_and_tells_it_by_its_scale() -> None:
    values = torch.ones(1, 2 * GROUP, dtype=torch.bfloat16)
    values[0, 1], values[0, 2] = INF, -INF
    quantized, exponents = mxfp8_group_quantize(values)
    assert exponents.tolist() == [[255, 119]]
    assert quantized.view(torch.uint8)[0, :4].tolist() == [0, NAN_BYTE, NAN_BYTE, 0]


def test_nan_stays_in_its_place_and_does_not_reach_the_scale() -> None:
    values = torch.ones(2, GROUP, dtype=torch.bfloat16)
    values[0, 5], values[1, :] = NAN, -NAN
    quantized, exponents = mxfp8_group_quantize(values)
    assert exponents.flatten().tolist() == [119, 0]
    assert quantized.view(torch.uint8)[0, 5] == NAN_BYTE
    assert quantized[0, :5].tolist() == [256.0] * 5
    assert (quantized.view(torch.uint8)[1] == NAN_BYTE).all()


def test_agrees_with_the_reference_that_sglang_has_for_rocm() -> None:
    rocm = pytest.importorskip("sglang.kernels.ops.quantization.mxfp8_amd_gfx95")
    reference = getattr(rocm, "_mxfp8_e4m3_quantize_torch", None) or pytest.skip("this release has none in torch")
    values = below(torch.logspace(-30, 30, 5000).bfloat16(), seed=2)
    for found, wanted in zip(mxfp8_group_quantize(values), reference(values), strict=True):
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("shape", [(4, 48), (4,), (2, 2, 32)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        mxfp8_group_quantize(torch.zeros(shape))


def test_dequantized_is_value_times_power_rounded_once() -> None:
    values = below(torch.logspace(-20, 20, 64).bfloat16(), seed=3).view(16, -1)
    quantized, exponents = mxfp8_group_quantize(values)
    powers = torch.ldexp(torch.ones(exponents.shape, dtype=torch.float64), exponents.int() - 127)
    exact = quantized.double() * powers.repeat_interleave(GROUP, 1)
    assert torch.equal(dequantize_groups(quantized, exponents, torch.bfloat16), exact.bfloat16())


def test_linear_layer_multiplies_with_the_dequantized_weight() -> None:
    generator = torch.Generator().manual_seed(4)
    weight, exponents = mxfp8_group_quantize(torch.randn(24, 2 * GROUP, generator=generator))
    given, bias = torch.randn(5, 2 * GROUP, generator=generator), torch.randn(24, generator=generator)
    run = mxfp8.dispatch_w8a8_mxfp8_linear()
    found = run(input=given, weight=weight, weight_scale=exponents, input_scale=None, bias=bias, pin_tactic=True)
    exact = given.double() @ dequantize_groups(weight, exponents, torch.float32).double().t() + bias.double()
    assert torch.allclose(found.double(), exact, rtol=0, atol=1e-4)


def test_quantized_activation_is_refused() -> None:
    weight, exponents = mxfp8_group_quantize(torch.ones(8, GROUP))
    with pytest.raises(NotImplementedError, match="activations in the model's dtype"):
        mxfp8.mxfp8_linear(torch.ones(1, GROUP), weight, exponents, input_scale=exponents)


def test_experts_multiply_with_dequantized_weights() -> None:
    generator = torch.Generator().manual_seed(5)
    shapes = {"w13": (4, 2 * GROUP, GROUP), "w2": (4, GROUP, GROUP)}
    plain = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    stored = {name: mxfp8_group_quantize(weight.flatten(0, 1)) for name, weight in plain.items()}
    experts = {name: tuple(part.view(*shapes[name][:2], -1) for part in pair) for name, pair in stored.items()}
    exact = {name: dequantize_groups(*pair, torch.float32).view(shapes[name]) for name, pair in stored.items()}
    tokens, ids = torch.randn(6, GROUP, generator=generator), torch.tensor([[0, 3], [1, 2], [3, 1]] * 2)
    weights = torch.full(ids.shape, 0.5)
    found = moe.experts(tokens, weights, ids, experts["w13"], experts["w2"], dequantize_groups)
    as_is = {name: (weight, weight) for name, weight in exact.items()}
    wanted = moe.experts(
        tokens, weights, ids, as_is["w13"], as_is["w2"], lambda weight, _scale, dtype: weight.to(dtype)
    )
    assert torch.equal(found, wanted)


def test_groups_within_a_row_are_no_square_blocks() -> None:
    assert mxfp8.square_blocks_of(lambda: [1, 32]) is None
    assert mxfp8.square_blocks_of(lambda: [128, 128]) == [128, 128]
    assert mxfp8.square_blocks_of(lambda: None) is None
