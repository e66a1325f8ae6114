# SPDX-License-Identifier: Apache-2.0
"""fp8 linear layers by dequantizing the weight to the activation's dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import linear

FP8_CAPABILITY = 89
"""Compute capability of the first GPUs with fp8 (Ada)."""


def is_scheme_supported(self: Any, min_capability: int, error: bool = True) -> bool:  # noqa: ARG001, FBT001
    """SGLang's ``CompressedTensorsConfig._check_scheme_supported``: as a GPU that has fp8 and nothing newer.

    Args:
        self: the config.
        min_capability: compute capability that a scheme's kernels need.
        error: raise where it is not supported.

    Raises:
        RuntimeError: the scheme needs newer kernels.
    """
    supported = min_capability <= FP8_CAPABILITY
    if error and not supported:
        raise RuntimeError(f"the CPU reference platform has no scheme that needs compute capability {min_capability}")
    return supported


def dequantize(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``weight * scale`` computed in float32 and rounded once to ``dtype``.

    Args:
        weight: float8_e4m3fn, any shape.
        scale: float32, broadcast against the weight.
        dtype: of the result.
    """
    return (weight.float() * scale).to(dtype)


def dequantize_blocks(
    weight: torch.Tensor, scale: torch.Tensor, block_size: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """As ``dequantize``, with one scale a block.

    Args:
        weight: float8_e4m3fn ``[N, K]``.
        scale: float32, ``[ceil(N / rows), ceil(K / columns)]``.
        block_size: rows and columns of a block; those at the edges may be smaller.
        dtype: of the result.
    """
    rows, columns = block_size
    spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return dequantize(weight, spread[: weight.shape[0], : weight.shape[1]], dtype)


def triton_w8a8_block_fp8_linear(
    input: torch.Tensor,  # noqa: A002 (SGLang's callers name it)
    weight: torch.Tensor,
    block_size: Sequence[int],
    weight_scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,  # noqa: ARG001
    bias: torch.Tensor | None = None,
    **gpu_choices: Any,  # noqa: ARG001
) -> torch.Tensor:
    """SGLang's block-wise linear on a CPU. The activation is not quantized.

    Args:
        input: ``[..., K]`` in the model's dtype.
        weight: ``[N, K]`` float8_e4m3fn.
        block_size: rows and columns of a block.
        weight_scale: float32, one a block.
        input_scale: not used.
        bias: ``[N]`` or None.
        gpu_choices: SGLang's switches between GPU kernels.

    Returns:
        ``[..., N]`` in the input's dtype.
    """
    return linear(input, dequantize_blocks(weight, weight_scale, block_size, input.dtype), bias)


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
