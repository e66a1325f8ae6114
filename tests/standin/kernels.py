# SPDX-License-Identifier: Apache-2.0
"""Emulations of the kernels that SGLang calls while a model is loaded.

Each has the kernel's own signature (not that of SGLang's wrapper), asserts its preconditions, picks a variant by size
where the kernel does, and writes what it writes. Arithmetic is float32 in the kernel's order; what ``--use_fast_math``
makes of a division on sm90 is not imitated, nor can it be here. ``ci/gpu_check`` compares each with the real kernel.

Paths are those of SGLang's repository, under ``python/sglang`` or ``sgl-kernel``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from standin.aten import OPERATIONS, on_host

FP8_MAX = 448.0
WARPS_A_BLOCK = 8
"""Rows that a block of the warp kernel quantizes: ``kPerTokenQuantTokensPerCTA``, once ``kTokensPerCTA``."""

BY_NAME: dict[str, Callable[..., Any]] = {}
"""Emulations by the name under which SGLang knows the kernel."""


@dataclass(frozen=True)
class Mirror:
    """Where a kernel's source is, and the releases in which it was read."""

    source: str
    releases: str


MIRRORS: dict[str, Mirror] = {}


def emulates(name: str, source: str, releases: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter an emulation, which counts as one operation each time."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            OPERATIONS.note(name)
            return function(*args, **kwargs)

        BY_NAME[name] = run
        MIRRORS[name] = Mirror(source, releases)
        return run

    return enter


def on_current_device(*tensors: torch.Tensor) -> None:
    """A kernel is launched on the thread's current device, whatever its pointers are of."""
    current = torch.cuda.current_device()
    for tensor in tensors:
        assert tensor.device.type == "cuda", f"a kernel was given a tensor on {tensor.device}"
        assert tensor.device.index == current, f"a kernel was launched on GPU {current} with memory of {tensor.device}"


def aligned(tensor: torch.Tensor, size: int = 16) -> None:
    """Vector loads of ``size`` bytes fault elsewhere."""
    assert tensor.data_ptr() % size == 0, f"a kernel loads {size} bytes at once from address {tensor.data_ptr():#x}"


def saturated(values: torch.Tensor) -> torch.Tensor:
    """``fmaxf(fminf(x, 448), -448)``, which drops NaN (as 448), cast to e4m3."""
    return torch.nan_to_num(values, nan=FP8_MAX).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def largest(values: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Largest magnitude by ``fmaxf``, which drops NaN."""
    magnitudes = torch.nan_to_num(values.abs(), nan=0.0, posinf=torch.inf)
    return magnitudes.amax() if dim is None else magnitudes.amax(dim=dim, keepdim=True)


@emulates(
    "per_token_quant_fp8",
    "kernels/jit/csrc/gemm/per_token_quant_fp8.cuh",
    "0.5.23; 0.5.17 to 0.5.22 under jit_kernel or kernels",
)
def per_token_quant_fp8(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor) -> None:
    """Each row by its largest magnitude: ``[rows, columns]`` to e4m3 and float32 ``[at least rows, 1]``.

    From ``16 * multiprocessors`` rows on, a warp quantizes a row and a row of zeros becomes zeros. Below, a block does,
    and divides by its scale of zero: all of a row of zeros becomes 0x7E.
    """
    rows, columns = input.shape
    assert rows > 0 and columns > 0 and columns % 4 == 0, f"hidden_dim must be divisible by 4, got {columns}"
    assert output_q.shape[0] >= rows and output_s.shape == (output_q.shape[0], 1)
    assert output_q.dtype == torch.float8_e4m3fn and output_s.dtype == torch.float32
    _quantize_rows(input, output_q[:rows], output_s[:rows])


def _quantize_rows(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor) -> None:
    on_current_device(input, output_q, output_s)
    assert input.is_contiguous() and output_q.is_contiguous()
    vector = 16 if (input.shape[1] * input.element_size()) % 16 == 0 else 4 * input.element_size()
    aligned(input, vector)
    aligned(output_q, vector // input.element_size())
    multiprocessors = torch.cuda.get_device_properties(input.device).multi_processor_count
    by_warps = len(input) >= multiprocessors * 2 * WARPS_A_BLOCK
    values = on_host(input).float()
    scale = largest(values, dim=1) / FP8_MAX
    inverse = 1.0 / scale
    if by_warps:
        inverse = torch.where(scale == 0, 0.0, inverse)
    on_host(output_q).copy_(saturated(values * inverse))
    on_host(output_s).copy_(scale.view(output_s.shape))


@emulates("per_tensor_quant_fp8", "kernels/jit/csrc/gemm/per_tensor_quant_fp8.cuh", "0.5.13.post1 to 0.5.23")
def per_tensor_quant_fp8(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor) -> None:
    """All of ``[elements]`` by one scale, which the largest magnitude is taken into: it must be 0 before."""
    on_current_device(input, output_q, output_s)
    assert input.dim() == 1 and output_q.shape == input.shape and output_s.shape == (1,)
    assert output_q.dtype == torch.float8_e4m3fn and output_s.dtype == torch.float32
    aligned(input)
    aligned(output_q, 16 // input.element_size())
    values, scale = on_host(input).float(), on_host(output_s)
    torch.maximum(scale, largest(values) / FP8_MAX, out=scale)
    on_host(output_q).copy_(saturated(values * (1.0 / scale)))
