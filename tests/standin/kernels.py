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

MARLIN_K, MARLIN_N = 16, 64
"""Rows and columns of a tile of Marlin's: ``tile_k_size`` and ``tile_n_size``."""

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
            # Models are built where the device is the default one for new tensors.
            with torch.device("cpu"):
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


def _check_per_tensor(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor) -> None:
    on_current_device(input, output_q, output_s)
    assert input.dim() == 1 and output_q.shape == input.shape and output_s.shape == (1,)
    assert output_q.dtype == torch.float8_e4m3fn and output_s.dtype == torch.float32
    aligned(input)
    aligned(output_q, 16 // input.element_size())


@emulates("per_tensor_quant_fp8", "kernels/jit/csrc/gemm/per_tensor_quant_fp8.cuh", "0.5.13.post1 to 0.5.23")
def per_tensor_quant_fp8(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor) -> None:
    """All of ``[elements]`` by one scale, which the largest magnitude is taken into: it must be 0 before."""
    _check_per_tensor(input, output_q, output_s)
    values, scale = on_host(input).float(), on_host(output_s)
    torch.maximum(scale, largest(values) / FP8_MAX, out=scale)
    on_host(output_q).copy_(saturated(values * (1.0 / scale)))


@emulates("per_tensor_quant_fp8<true", "kernels/jit/csrc/gemm/per_tensor_quant_fp8.cuh", "0.5.23")
def per_tensor_quant_fp8_by_given_scale(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor) -> None:
    """All of ``[elements]`` by the scale that is there: the template with ``kIsStatic``."""
    _check_per_tensor(input, output_q, output_s)
    on_host(output_q).copy_(saturated(on_host(input).float() * (1.0 / on_host(output_s))))


@emulates("sgl_per_token_quant_fp8", "sgl-kernel/csrc/gemm/per_token_quant_fp8.cu", "main branch")
def sgl_per_token_quant_fp8(input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor) -> None:
    """Each row by its largest magnitude, as ``per_token_quant_fp8``, which was made of it."""
    rows, columns = input.shape
    assert columns % 4 == 0, f"Hidden dimension must be divisible by 4, but got {columns}"
    assert output_s.is_contiguous() and output_s.numel() >= rows
    _quantize_rows(input, output_q[:rows], output_s.view(-1)[:rows])


@emulates("per_token_group_quant_8bit", "jit_kernel/csrc/gemm/per_token_group_quant_8bit.cuh", "0.5.13.post1")
def per_token_group_quant_8bit(
    input: torch.Tensor,
    output_q: torch.Tensor,
    output_s: torch.Tensor,
    group_size: int,
    eps: float,
    min_8bit: float,
    max_8bit: float,
    scale_ue8m0: bool,
) -> None:
    """Each group of ``group_size`` columns by its largest magnitude, or ``eps``: ``[M, K]``, scales ``[M, groups]``.

    Divides by the scale. NaN becomes -448: ``max(NaN, -448)`` comes before ``min``. Columns beyond the last full 16
    bytes of a group are never written, which no weight may want.
    """
    assert not scale_ue8m0, "no weight is quantized with packed scales here"
    assert input.dim() == 2 and output_q.shape == input.shape and output_s.dtype == torch.float32
    _check_groups(input, output_q, group_size, 16)
    values, scale = on_host(input).float().view(-1, group_size), on_host(output_s)
    absmax = largest(values, dim=1).clamp(min=eps)
    factors = absmax / max_8bit
    quantized = torch.nan_to_num(values / factors, nan=min_8bit).clamp(min_8bit, max_8bit)
    on_host(output_q).copy_(quantized.view(input.shape))
    scale.copy_(factors.view(scale.shape))


@emulates(
    "sgl_per_token_group_quant_8bit",
    "sgl-kernel/csrc/gemm/per_token_group_quant_8bit_v2.cu",
    "main branch",
)
def sgl_per_token_group_quant_8bit(
    input: torch.Tensor,
    output_q: torch.Tensor,
    output_s: torch.Tensor,
    group_size: int,
    eps: float,
    fp8_min: float,
    fp8_max: float,
    scale_ue8m0: bool,
    fuse_silu_and_mul: bool = False,
    masked_m: torch.Tensor | None = None,
    enable_v2: bool | None = None,
) -> None:
    """As ``per_token_group_quant_8bit``, for weights as narrow as a group: multiplies by reciprocals.

    0.5.16 has it quantize whole rows too, without ``enable_v2``: by ``per_token_group_quant_8bit.cu``, which
    ``per_token_group_quant_8bit`` was made of.
    """
    assert not scale_ue8m0 and not fuse_silu_and_mul and masked_m is None, "not what weights ask for"
    if not enable_v2:
        per_token_group_quant_8bit(input, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0)
        return
    assert eps == 1e-10
    _quantize_narrow_groups(input, output_q, output_s, group_size)


@emulates("per_token_group_quant_8bit_v2", "jit_kernel/csrc/gemm/per_token_group_quant_8bit_v2.cuh", "0.5.15.post1")
def per_token_group_quant_8bit_v2(
    input: torch.Tensor,
    output_q: torch.Tensor,
    output_s: torch.Tensor,
    masked_m: torch.Tensor,
    group_size: int,
    scale_ue8m0: bool,
    fuse_silu_and_mul: bool,
    masked_layout: bool,
    num_groups: int,
    num_local_experts: int,
    is_column_major: bool,
    hidden_dim_num_groups: int,
    num_tokens_per_expert: int,
    scale_expert_stride: int,
    scale_hidden_stride: int,
) -> None:
    """As ``sgl_per_token_group_quant_8bit``, of which it was made."""
    assert not scale_ue8m0 and not fuse_silu_and_mul and not masked_layout, "not what weights ask for"
    assert num_groups == input.numel() // group_size and hidden_dim_num_groups == input.shape[-1] // group_size
    assert num_local_experts == 1 and num_tokens_per_expert == input.shape[-2]
    _quantize_narrow_groups(input, output_q, output_s, group_size)


def _quantize_narrow_groups(
    input: torch.Tensor, output_q: torch.Tensor, output_s: torch.Tensor, group_size: int
) -> None:
    assert group_size in (16, 32, 64, 128)
    assert input.dtype in (torch.float16, torch.bfloat16)
    _check_groups(input, output_q, group_size, 32)
    values, scale = on_host(input).float().view(-1, group_size), on_host(output_s)
    absmax = largest(values, dim=1).clamp(min=1e-10)
    products = torch.nan_to_num(values * (FP8_MAX / absmax), nan=-FP8_MAX).clamp(-FP8_MAX, FP8_MAX)
    on_host(output_q).copy_(products.view(input.shape))
    scale.copy_((absmax * (1.0 / torch.tensor(FP8_MAX, dtype=torch.float32))).view(scale.shape))


def _check_groups(input: torch.Tensor, output_q: torch.Tensor, group_size: int, vector: int) -> None:
    on_current_device(input, output_q)
    assert input.is_contiguous() and output_q.is_contiguous() and output_q.dtype == torch.float8_e4m3fn
    assert input.shape[-1] % group_size == 0
    assert group_size * input.element_size() % vector == 0, f"a group of {group_size} is no multiple of {vector} bytes"
    aligned(input)


@emulates("gptq_marlin_repack", "kernels/jit/csrc/gemm/marlin/gptq_marlin_repack.cuh", "0.5.13.post1 to 0.5.23")
def gptq_marlin_repack(
    b_q_weight: torch.Tensor, perm: torch.Tensor, out: torch.Tensor, size_k: int, size_n: int, num_bits: int
) -> None:
    """int32 ``[K / 4, N]``, four fp8 values down a column each, to ``[K / 16, 4 * N]`` as tensor cores take them.

    A tile of 16 x 64 values becomes 256 words: lane ``t`` of warp ``w`` packs the values of two columns,
    ``16 * w + t / 4`` and 8 further on, in the rows ``2 * (t % 4) + (0, 8, 1, 9)``.
    """
    assert num_bits == 8, "of weights in 4 bits none is loaded as fp8"
    assert size_k % MARLIN_K == 0, f"size_k = {size_k} is not divisible by tile_k_size = {MARLIN_K}"
    assert size_n % MARLIN_N == 0, f"size_n = {size_n} is not divisible by tile_n_size = {MARLIN_N}"
    assert b_q_weight.shape == (size_k // 4, size_n) and b_q_weight.dtype == torch.int32
    assert out.shape == (size_k // MARLIN_K, size_n * MARLIN_K // 4) and out.dtype == torch.int32
    assert b_q_weight.is_contiguous() and out.is_contiguous() and len(perm) == 0
    on_current_device(b_q_weight, out)
    aligned(b_q_weight)
    # [K, N], then [K tiles, 16, N tiles, 4 warps, 2 columns, 8 lanes / 4].
    values = on_host(b_q_weight).view(torch.uint8).view(size_k // 4, size_n, 4).transpose(1, 2).reshape(size_k, size_n)
    tiles = values.view(size_k // MARLIN_K, MARLIN_K, size_n // MARLIN_N, 4, 2, 8)
    # The rows of a lane, in the order in which they are packed: [4 lanes % 4, 4].
    rows = 2 * torch.arange(4).unsqueeze(1) + torch.tensor([0, 8, 1, 9])
    # [K tiles, 4 lanes % 4, 4 packed, N tiles, 4 warps, 2 columns, 8 lanes / 4]
    packed = tiles[:, rows].permute(0, 3, 6, 1, 4, 5, 2)
    on_host(out).copy_(packed.contiguous().view(torch.int32).view(out.shape))
