# SPDX-License-Identifier: Apache-2.0
"""MXFP8 (OCP Microscaling Formats 1.0: e4m3 values, one power of two for 32 of them) without a GPU.

The arithmetic is that of SGLang's ``mxfp8_group_quantize`` on CUDA, ``downcast_to_mxfp`` of ``triton_kernels`` with its
default rounding (``numerics_details/mxfp_details/_downcast_to_mxfp.py``), all in float32:

- a group's scale is its largest magnitude, NaN skipped, over 448, rounded up to a power of two; stored is the exponent
  with a bias of 127 (UE8M0). 0 stands for a group of zeros; else 1 is the least.
- values are multiplied by the reciprocal, which is exact, and rounded to the nearest e4m3, ties to even. None is above
  448, since the scale has been rounded up.
- a group with Inf gets the exponent 255, NaN in the place of the Inf, and zeros else.

Experts keep the plain layout of scales, ``[E, rows, columns / 32]``, as upstream's on ROCm; on CUDA it is each kernel's
own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from sglang_overlay.cpu_reference.linear import dequantize_blocks
from sglang_overlay.cpu_reference.quantizer import FP8, FP8_MAX
from sglang_overlay.schemes.arithmetic import CHUNK_ELEMENTS

GROUP = 32
_MANTISSA_BITS = 23
_EXPONENT = 0x7F800000
_MANTISSA = 0x007FFFFF


def mxfp8_group_quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's ``mxfp8_group_quantize`` on a CPU.

    Args:
        x: ``[rows, columns]`` float32, float16 or bfloat16, columns a multiple of 32.

    Returns:
        The values as float8_e4m3fn, ``[rows, columns]``, and uint8 exponents ``[rows, columns / 32]``.

    Raises:
        ValueError: ``x`` has another shape.
    """
    if x.ndim != 2 or x.shape[1] % GROUP:
        raise ValueError(f"MXFP8 takes a matrix whose columns are a multiple of {GROUP}, not {tuple(x.shape)}")
    rows, columns = x.shape
    quantized = torch.empty(rows, columns, dtype=FP8)
    exponents = torch.empty(rows, columns // GROUP, dtype=torch.uint8)
    at_once = max(1, CHUNK_ELEMENTS // max(columns, 1))
    # In pieces: like the kernel, this takes no memory for a copy in float32.
    for part, out, bytes_out in zip(x.split(at_once), quantized.split(at_once), exponents.split(at_once), strict=True):
        groups = part.to(torch.float32, copy=True).view(len(part), -1, GROUP)
        bytes_out.copy_(exponents_of(absmax_of_groups(groups)))
        out.copy_(_times(groups, _reciprocals(bytes_out)).view(part.shape))
    return quantized, exponents


def absmax_of_groups(groups: torch.Tensor) -> torch.Tensor:
    """Largest magnitude in each group (the last dimension), NaN skipped, 0 where there is nothing else."""
    magnitudes = groups.abs()
    largest = magnitudes.amax(dim=-1)
    if largest.isnan().any():
        largest = magnitudes.nan_to_num_(nan=0.0, posinf=torch.inf).amax(dim=-1)
    return largest


def exponents_of(absmax: torch.Tensor) -> torch.Tensor:
    """Biased exponents, uint8, of the least powers of two that bring float32 magnitudes to 448 or less."""
    bits = (absmax / FP8_MAX).view(torch.int32)
    return (((bits + _MANTISSA) & _EXPONENT) >> _MANTISSA_BITS).to(torch.uint8)


def powers_of_two(exponents: torch.Tensor) -> torch.Tensor:
    """What biased exponents, uint8, stand for, in float32: 0 for 0, as in SGLang's own code, and Inf for 255."""
    return (exponents.to(torch.int32) << _MANTISSA_BITS).view(torch.float32)


def dequantize_groups(weight: torch.Tensor, exponents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An MXFP8 matrix in another dtype, rounded once.

    Args:
        weight: float8_e4m3fn ``[N, K]``.
        exponents: uint8 ``[N, K / 32]``.
        dtype: of the result.
    """
    return dequantize_blocks(weight, powers_of_two(exponents), (1, GROUP), dtype)


def dispatch_w8a8_mxfp8_linear() -> Callable[..., torch.Tensor]:
    """SGLang's choice of an MXFP8 kernel for linear layers, where there is one."""
    return mxfp8_linear


def mxfp8_linear(
    input: torch.Tensor,  # noqa: A002 (SGLang's callers name it)
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    **gpu_choices: Any,  # noqa: ARG001
) -> torch.Tensor:
    """An MXFP8 linear layer on a CPU. The activation is not quantized.

    Args:
        input: ``[..., K]`` in the model's dtype.
        weight: ``[N, K]`` float8_e4m3fn.
        weight_scale: uint8 exponents ``[N, K / 32]``.
        input_scale: None, see below.
        bias: ``[N]`` or None.
        gpu_choices: SGLang's switches between GPU kernels.

    Returns:
        ``[..., N]`` in the input's dtype.

    Raises:
        NotImplementedError: for an input that is quantized already; SGLang's fused GPU kernels make such.
    """
    if input_scale is not None:
        raise NotImplementedError("the CPU reference platform takes activations in the model's dtype, not in MXFP8")
    return linear(input, dequantize_groups(weight, weight_scale, input.dtype), bias)


def square_blocks_of(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's ``may_get_weight_block_size``: None for MXFP8, whose groups lie within a row."""
    found = original(*args, **kwargs)
    return None if found is not None and tuple(found) == (1, GROUP) else found


def process_mxfp8_moe_weights(self: Any, layer: torch.nn.Module, quantize: bool = True) -> None:  # noqa: ARG001, FBT001
    """SGLang's ``Fp8MoEMethod._process_mxfp8_moe_weights`` on a CPU.

    Args:
        self: the ``Fp8MoEMethod``.
        layer: with w13_weight ``[E, 2I, H]`` and w2_weight ``[E, H, I]``, and uint8 scales ``[E, rows, columns / 32]``.
        quantize: whether the weights are in high precision still; else they and their scales stay as they are.
    """
    for name in ("w13_weight", "w2_weight"):
        weight, scale = layer.get_parameter(name), layer.get_parameter(f"{name}_scale_inv")
        if quantize:
            values, exponents = mxfp8_group_quantize(weight.data.flatten(0, 1))
            weight.data = values.view(weight.shape)
            scale.data.copy_(exponents.view(scale.shape))
        scale.format_ue8m0 = True  # type: ignore[attr-defined]
    layer.w13_input_scale = layer.w2_input_scale = None  # type: ignore[assignment]


def _reciprocals(exponents: torch.Tensor) -> torch.Tensor:
    """What values are multiplied by: 0 for groups of zeros."""
    powers = powers_of_two(exponents)
    return torch.where(powers == 0, powers, powers.reciprocal())


def _times(groups: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    products = groups.mul_(factors.unsqueeze(-1))
    # The kernel's NaN has no sign; the one that Inf times 0 makes here has.
    return products.masked_fill_(products.isnan(), torch.nan)
