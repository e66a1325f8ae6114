# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of upstream's row kernels, in torch on the CPU, for exports and the CPU reference."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang_overlay.core.quantizers import RowQuantizer
from sglang_overlay.schemes import capabilities

CHUNK_ELEMENTS = 1 << 18
"""Elements cast at once: 1 MiB of float32, so that the intermediate stays in cache."""


def quantize_rows(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-channel quantization of ``[rows, columns]`` on the CPU, where upstream's kernel cannot run.

    The float32 arithmetic of SGLang's CUDA kernel for rows (``per_token_quant_fp8.cuh``, 0.5.17 to 0.5.23; read, not
    run): the scale is the largest magnitude over the largest fp8 value, and values are multiplied by its reciprocal.
    NaN is ignored for the scale and stored as the largest value. A row of zeros gets scale 0 and zeros, as that kernel
    does when it gets many rows. For Hopper, SGLang compiles it with ``--use_fast_math``: last places may differ.

    Returns:
        fp8 ``[rows, columns]`` and float32 ``[rows, 1]``.
    """
    quantized, scales = _results(values, dtype)
    largest_value = torch.finfo(dtype).max
    # The scale must be a normal number: the reciprocal of a subnormal one may be infinite.
    smallest = 2 * largest_value * torch.finfo(torch.float32).smallest_normal
    for wide, out, scale in _row_chunks(values, quantized, scales):
        absmax = wide.abs().amax(dim=-1, keepdim=True)
        is_ordinary = bool(((absmax >= smallest) & (absmax < torch.inf)).all())
        if not is_ordinary:
            absmax = wide.abs().nan_to_num_(nan=0.0, posinf=torch.inf).amax(dim=-1, keepdim=True)
        products = wide.mul_(torch.div(absmax, largest_value, out=scale).reciprocal())
        if not is_ordinary:
            products.nan_to_num_(nan=largest_value, posinf=torch.inf, neginf=-torch.inf)
            products.clamp_(-largest_value, largest_value).masked_fill_(scale == 0, 0.0)
        out.copy_(products)
    return quantized, scales


def quantize_rows_as_groups(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Like ``quantize_rows``, with the arithmetic of releases that quantize each row as one group.

    In ``per_token_group_quant_8bit.cuh`` (0.5.13 and 0.5.15), the largest magnitude is at least 1e-10, and values are
    divided by the scale.
    """
    quantized, scales = _results(values, dtype)
    largest_value = torch.finfo(dtype).max
    for wide, out, scale in _row_chunks(values, quantized, scales):
        torch.div(wide.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-10), largest_value, out=scale)
        out.copy_(wide.div_(scale).clamp_(-largest_value, largest_value))
    return quantized, scales


def _results(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    # float32 is named, since SGLang makes the model's dtype the default while it loads.
    return torch.empty(values.shape, dtype=dtype), torch.empty(len(values), 1, dtype=torch.float32)


def _row_chunks(values: torch.Tensor, *results: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Chunks of rows: those of ``values`` as a float32 copy, and the same rows of each of ``results``."""
    rows = max(1, CHUNK_ELEMENTS // values.shape[-1])
    for part, *outputs in zip(*(tensor.split(rows) for tensor in (values, *results)), strict=True):
        yield part.to(torch.float32, copy=True), *outputs


def row_quantizer() -> RowQuantizer:
    """A CPU quantizer with one scale per row and the arithmetic of the installed release's kernel."""
    from sglang.srt.layers.quantization import fp8

    quantize = quantize_rows if capabilities.has_row_kernel() else quantize_rows_as_groups
    return RowQuantizer(lambda values: quantize(values, fp8.fp8_dtype))
