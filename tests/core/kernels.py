# SPDX-License-Identifier: Apache-2.0
"""Upstream's kernels in torch, with what they ask of their arguments: which kernel is picked, and addresses.

The arithmetic is that of a build without fast-math.
"""

from __future__ import annotations

import pytest
import torch

from core import streams
from sglang_overlay.core.quantizers import RowKernelQuantizer, WholeUnitQuantizer

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


class RowKernel:
    """``per_token_group_quant_fp8(x, x.shape[-1])`` of SGLang 0.5.17 to 0.5.22 on CUDA.

    Mirrors ``launch_per_token_quant_fp8`` of ``kernels/jit/csrc/gemm/per_token_quant_fp8.cuh`` in SGLang 0.5.23. Before
    0.5.19 it was sgl-kernel's ``per_token_quant_fp8.cu``, with the same two kernels.

    Args:
        multiprocessors: of the device.
    """

    def __init__(self, multiprocessors: int = 132) -> None:
        self._warp_rows = multiprocessors * 2 * 8
        self.calls: list[tuple[int, int]] = []

    def __call__(self, x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        q, s = torch.empty_like(x, dtype=FP8), torch.empty(len(x), 1, dtype=torch.float32)
        self.run(x, group_size, q, s)
        return q, s

    def run(self, x: torch.Tensor, group_size: int, q: torch.Tensor, s: torch.Tensor) -> None:
        assert x.is_contiguous()
        assert group_size == x.shape[-1]
        assert group_size % 4 == 0
        width = 8 if group_size % 8 == 0 else 4
        assert x.data_ptr() % (width * x.itemsize) == 0, "misaligned address"
        assert q.data_ptr() % width == 0, "misaligned address"
        self.calls.append((len(x), group_size))
        wide = x.float()
        # fmaxf drops NaN.
        scale = wide.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim=1, keepdim=True) / FP8_MAX
        inverse = 1 / scale
        if len(x) >= self._warp_rows:
            inverse = torch.where(scale == 0, 0.0, inverse)
        products = (wide * inverse).nan_to_num(nan=FP8_MAX, posinf=torch.inf, neginf=-torch.inf)
        q.copy_(products.clamp(-FP8_MAX, FP8_MAX))
        s.view(len(x), 1).copy_(scale)


class RowKernelInPlace(RowKernel):
    """That of SGLang 0.5.23, whose ``sglang_per_token_group_quant_fp8`` takes memory for its results."""

    def __call__(self, x, group_size, *, output_q=None, output_s=None):
        if output_q is None:
            return super().__call__(x, group_size)
        assert output_q.is_contiguous()
        self.run(x, group_size, output_q, output_s)
        return output_q, output_s


def scaled_fp8_quant(unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirrors ``scaled_fp8_quant`` of ``fp8_kernel.py`` and the kernels of ``per_tensor_quant_fp8.cuh`` (0.5.23)."""
    assert unit.ndim == 2
    assert unit.is_contiguous()
    assert unit.data_ptr() % 16 == 0, "misaligned address"
    scale = unit.float().abs().nan_to_num(nan=0.0, posinf=torch.inf).amax().reshape(1) / FP8_MAX
    products = (unit.float() * (1 / scale)).nan_to_num(nan=FP8_MAX, posinf=torch.inf, neginf=-torch.inf)
    return products.clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def use_kernels(patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone, streams have the quantizers of a GPU, with upstream's kernels in torch.

    From 16 rows on the whole weight has another kernel than its parts, as on a GPU from 16 rows a multiprocessor on.
    """
    patch.setattr(streams, "one_scale", lambda: WholeUnitQuantizer(scaled_fp8_quant))
    patch.setattr(
        streams, "one_scale_a_row", lambda rows: RowKernelQuantizer(RowKernelInPlace(multiprocessors=1), rows)
    )
