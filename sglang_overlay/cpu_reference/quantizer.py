# SPDX-License-Identifier: Apache-2.0
"""Per-tensor fp8 quantization with the arithmetic of SGLang's CUDA kernel.

Source: ``sglang/kernels/jit/csrc/gemm/per_tensor_quant_fp8.cuh`` of SGLang 0.5.23 (the same arithmetic as sgl-kernel's
earlier ``per_tensor_quant_fp8.cu``), which is built without fast-math:

- absmax: ``fmaxf`` over ``float(x)``, which skips NaN, then ``scale = absmax / 448.0f``;
- values: ``fmaxf(fminf(float(x) * (1.0f / scale), 448.0f), -448.0f)`` to e4m3, rounding to nearest even.

``fminf(NaN, 448)`` is 448, so a NaN product is stored as 448. That is what makes an all-zero tensor safe: its scale is
0, ``0 * (1 / 0)`` is NaN, every element is stored as 448, and dequantizes to ``448 * 0 = 0``.
"""

from __future__ import annotations

import torch

from sglang_overlay.schemes.arithmetic import CHUNK_ELEMENTS

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


def quantize_per_tensor(tensor: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a tensor with one scale.

    Args:
        tensor: float32, float16 or bfloat16, any shape.
        scale: float32, one element; computed from the tensor where None.

    Returns:
        The values as float8_e4m3fn, contiguous, of the tensor's shape; the scale, float32, shape ``[1]``.
    """
    if scale is None:
        scale = absmax(tensor).div_(FP8_MAX)
    values, multiplier = tensor.reshape(-1), scale.reciprocal().reshape(1)
    quantized = torch.empty(values.shape, dtype=FP8)
    # In pieces: like the kernel, this takes no memory for a copy in float32.
    for part, out in zip(values.split(CHUNK_ELEMENTS), quantized.split(CHUNK_ELEMENTS), strict=True):
        products = part.to(torch.float32, copy=True).mul_(multiplier)
        out.copy_(products.nan_to_num_(nan=FP8_MAX).clamp_(-FP8_MAX, FP8_MAX))
    return quantized.view(tensor.shape), scale.reshape(1)


def absmax(tensor: torch.Tensor) -> torch.Tensor:
    """Largest magnitude in a tensor, NaN skipped, 0 where there is none; float32, shape ``[1]``."""
    if not tensor.numel():
        return torch.zeros(1, dtype=torch.float32)
    smallest, largest = tensor.aminmax()
    if smallest.isnan():
        smallest, largest = tensor.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).aminmax()
    return torch.maximum(smallest.abs(), largest.abs()).float().reshape(1)


def scaled_fp8_quant(
    input: torch.Tensor,  # noqa: A002 (SGLang's callers may name it)
    scale: torch.Tensor | None = None,
    num_token_padding: int | None = None,
    use_per_token_if_dynamic: bool = False,  # noqa: FBT001
) -> tuple[torch.Tensor, torch.Tensor]:
    """SGLang's ``scaled_fp8_quant`` on a CPU, for weights: per-tensor, static or dynamic, no padding.

    Raises:
        NotImplementedError: for padded or per-token quantization, which only activations get; this platform keeps
            activations in their own dtype.
    """
    if input.ndim != 2:
        raise ValueError(f"scaled_fp8_quant takes a matrix, not a tensor of shape {tuple(input.shape)}")
    if num_token_padding or use_per_token_if_dynamic:
        raise NotImplementedError("the CPU reference platform quantizes weights, not activations: per tensor, unpadded")
    return quantize_per_tensor(input, scale)
