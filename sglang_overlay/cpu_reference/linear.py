# SPDX-License-Identifier: Apache-2.0
"""fp8 linear layers by dequantizing the weight to the activation's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight * scale`` computed in float32 and rounded once to ``dtype``.

    Args:
        weight: float8_e4m3fn, any shape.
        scale: float32, broadcast against the weight.
        dtype: of the result.
    """
    return (weight.float() * scale).to(dtype)


def apply_fp8_linear(
    input: torch.Tensor,  # noqa: A002 (SGLang's callers name it)
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,  # noqa: ARG001
    input_scale_ub: torch.Tensor | None = None,  # noqa: ARG001
    bias: torch.Tensor | None = None,
    **gpu_choices: Any,  # noqa: ARG001
) -> torch.Tensor:
    """SGLang's ``apply_fp8_linear`` on a CPU. The activation is not quantized, so its scales are not used.

    Args:
        input: ``[..., K]`` in the model's dtype.
        weight: ``[K, N]`` float8_e4m3fn, SGLang's transposed view.
        weight_scale: float32; one element (per tensor) or N (per output channel, any shape).
        input_scale: not used, see above; nor is input_scale_ub.
        bias: ``[N]`` or None.
        gpu_choices: SGLang's switches between GPU kernels.

    Returns:
        ``[..., N]`` in the input's dtype.

    Raises:
        NotImplementedError: for an input that is already fp8; SGLang produces one only in fused CUDA kernels.
    """
    if input.dtype == torch.float8_e4m3fn:
        raise NotImplementedError("the CPU reference platform takes activations in the model's dtype, not fp8")
    matrix = dequantize(weight.t(), weight_scale.reshape(-1, 1), input.dtype)
    return linear(input, matrix, bias)
