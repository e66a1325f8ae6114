# SPDX-License-Identifier: Apache-2.0
"""What SGLang's loading calls of FlashInfer, DeepGEMM and triton_kernels.

Rules are those of :mod:`standin.kernels`. Paths are those of the library's own repository.
"""

from __future__ import annotations

import torch

from standin.aten import on_host
from standin.kernels import BY_NAME, MIRRORS, Mirror, aligned, emulates, on_current_device

GROUP = 32
"""Values in a row that share an exponent, in MXFP8."""
TILE_ROWS, TILE_COLUMNS = 128, 4
"""Of scales, in the layout that Blackwell's tensor cores read."""
_ROW_MAP = {block: torch.arange(block).view(-1, 8).t().reshape(-1) for block in (16, 32)}
"""``srcToDstBlk16RowMap`` (0, 8, 1, 9, ...) and ``srcToDstBlk32RowMap`` (0, 8, 16, 24, 1, ...)."""

_FLASHINFER = "flashinfer-ai/flashinfer flashinfer/utils.py, fused_moe/core.py"


# ---------------------------------------------------------------------------------------------------------------------
# FlashInfer: Python of its own, above torch's operators
# ---------------------------------------------------------------------------------------------------------------------


def get_shuffle_matrix_a_row_indices(input_tensor: torch.Tensor, epilogue_tile_m: int) -> torch.Tensor:
    """Which row of ``[M, K]`` goes where: int64 ``[M]`` on the CPU, old rows by their new places."""
    assert input_tensor.dim() == 2, f"input_tensor should be a 2D tensor, not {input_tensor.dim()}"
    rows = len(input_tensor)
    block = 32 if epilogue_tile_m % 128 == 0 else 16
    assert rows % block == 0, f"input_tensor.shape[0] must be multiples of {block}"
    indices = torch.empty(rows, dtype=torch.long)
    # Row r of a block goes to the place that the table has at r.
    indices.view(-1, block)[:, _ROW_MAP[block]] = torch.arange(rows).view(-1, block)
    return indices


def get_shuffle_matrix_sf_a_row_indices(
    input_tensor: torch.Tensor, epilogue_tile_m: int, num_elts_per_sf: int = 16
) -> torch.Tensor:
    """As of the matrix; scales must come in whole tiles."""
    assert input_tensor.dtype in (torch.uint8, torch.bfloat16)
    assert num_elts_per_sf in (16, 32)
    assert input_tensor.dim() == 2, f"input_tensor should be a 2D tensor, not {input_tensor.dim()}"
    assert input_tensor.shape[0] % TILE_ROWS == 0 and input_tensor.shape[1] % TILE_COLUMNS == 0
    return get_shuffle_matrix_a_row_indices(input_tensor, epilogue_tile_m)


def shuffle_matrix_a(input_tensor: torch.Tensor, epilogue_tile_m: int) -> torch.Tensor:
    """A matrix with its rows shuffled for a transposed product."""
    return input_tensor[get_shuffle_matrix_a_row_indices(input_tensor, epilogue_tile_m).to(input_tensor.device)]


def shuffle_matrix_sf_a(input_tensor: torch.Tensor, epilogue_tile_m: int, num_elts_per_sf: int = 16) -> torch.Tensor:
    """Scales with their rows shuffled, then in tiles."""
    rows = get_shuffle_matrix_sf_a_row_indices(input_tensor, epilogue_tile_m, num_elts_per_sf)
    swizzled: torch.Tensor = BY_NAME["block_scale_interleave"](input_tensor[rows.to(input_tensor.device)])
    return swizzled


def get_reorder_rows_for_gated_act_gemm_row_indices(x: torch.Tensor) -> torch.Tensor:
    """Rows of gate and up alternately: int64 ``[M]`` on the CPU."""
    assert x.dim() == 2, f"x should be a 2D tensor, not {x.dim()}"
    assert len(x) % 2 == 0, f"x.shape[0] must be even, not {len(x)}"
    return torch.arange(len(x)).view(2, -1).t().reshape(-1)


def reorder_rows_for_gated_act_gemm(x: torch.Tensor) -> torch.Tensor:
    """A matrix in that order."""
    return x[get_reorder_rows_for_gated_act_gemm_row_indices(x).to(x.device)]


for _function in (
    get_shuffle_matrix_a_row_indices,
    get_shuffle_matrix_sf_a_row_indices,
    shuffle_matrix_a,
    shuffle_matrix_sf_a,
    get_reorder_rows_for_gated_act_gemm_row_indices,
    reorder_rows_for_gated_act_gemm,
):
    # Python over torch's operators, which are counted: no launch of their own.
    BY_NAME[_function.__name__] = _function
    MIRRORS[_function.__name__] = Mirror(_FLASHINFER, "main branch")


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@emulates(
    "block_scale_interleave",
    "flashinfer-ai/flashinfer flashinfer/quantization/fp4_quantization.py; get_sf_out_offset_128x4",
    "main branch",
)
def block_scale_interleave(unswizzled_sf: torch.Tensor) -> torch.Tensor:
    """Scales ``[M, K]`` or ``[E, M, K]`` uint8 in tiles of 128 x 4, padded with zeros to whole ones; one dimension."""
    assert unswizzled_sf.dtype in (torch.uint8, torch.bfloat16), f"got {unswizzled_sf.dtype}"
    assert unswizzled_sf.dim() in (2, 3) and unswizzled_sf.is_contiguous()
    on_current_device(unswizzled_sf)
    *_, rows, columns = unswizzled_sf.shape
    scales = on_host(unswizzled_sf).view(-1, rows, columns)
    padded = torch.nn.functional.pad(scales, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    return _to_device(_in_tiles(padded).reshape(-1), unswizzled_sf)


def _in_tiles(scales: torch.Tensor) -> torch.Tensor:
    """``[E, M, K]``, whole tiles: row 32 * i + j of a tile lies at place 4 * j + i of four bytes."""
    experts, rows, columns = scales.shape
    tiles = scales.view(experts, rows // TILE_ROWS, 4, 32, columns // TILE_COLUMNS, TILE_COLUMNS)
    return tiles.permute(0, 1, 4, 3, 2, 5)


class SfLayout:
    """FlashInfer's enumeration of scale layouts."""

    layout_128x4 = 0
    layout_8x4 = 1
    layout_linear = 2


BY_NAME["SfLayout"] = SfLayout


@emulates(
    "mxfp8_quantize",
    "flashinfer-ai/flashinfer flashinfer/quantization/fp8_quantization.py; cvt_warp_fp16_to_mxfp8",
    "main branch",
)
def mxfp8_quantize(
    input: torch.Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    sf_swizzle_layout: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``[M, K]`` bf16 or fp16 to e4m3 and a byte for 32 values, in one dimension.

    The least power of two that brings a group to 448 or less; the product with 1/448 is rounded once here, on a GPU
    the reciprocal is approximate.
    """
    assert input.shape[-1] % GROUP == 0 and alignment == GROUP
    assert input.dtype in (torch.float16, torch.bfloat16) and input.is_contiguous()
    assert backend in ("cuda", "cute-dsl"), f"backend must be 'cuda' or 'cute-dsl', got {backend!r}"
    on_current_device(input)
    aligned(input)
    layout = sf_swizzle_layout
    if layout is None:
        layout = SfLayout.layout_128x4 if is_sf_swizzled_layout else SfLayout.layout_linear
    values, exponents = _groups_of(on_host(input), 1 / torch.tensor(448.0, dtype=torch.float32))
    if layout != SfLayout.layout_linear:
        rows, columns = exponents.shape
        padded = torch.nn.functional.pad(exponents, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
        assert layout == SfLayout.layout_128x4, "8x4 is not emulated"
        exponents = _in_tiles(padded.unsqueeze(0))
    return _to_device(values, input), _to_device(exponents.reshape(-1), input)


@emulates(
    "downcast_to_mxfp",
    "triton-lang/triton python/triton_kernels/triton_kernels/numerics_details/mxfp.py, its default rounding (up)",
    "main branch",
)
def downcast_to_mxfp(src: torch.Tensor, out_quant_type: torch.dtype, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[M, K]`` to e4m3 of the same shape and exponents ``[M, ceil(K / 32)]`` uint8."""
    assert out_quant_type == torch.float8_e4m3fn and src.dim() == 2 and axis == 1
    assert src.dtype in (torch.float16, torch.bfloat16, torch.float32)
    on_current_device(src)
    values, exponents = _groups_of(on_host(src), None)
    return _to_device(values, src), _to_device(exponents, src)


def _groups_of(matrix: torch.Tensor, reciprocal: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 ``[M, K]`` and exponents ``[M, K / 32]``; the scale of a group is its largest magnitude over 448."""
    groups = matrix.float().view(len(matrix), -1, GROUP)
    largest = torch.nan_to_num(groups.abs(), nan=0.0, posinf=torch.inf).amax(-1)
    scale = largest / 448.0 if reciprocal is None else largest * reciprocal
    bits = scale.view(torch.int32)
    exponents = ((bits + 0x7FFFFF) & 0x7F800000) >> 23
    powers = (exponents << 23).view(torch.float32)
    factors = torch.where(powers == 0, powers, powers.reciprocal()).unsqueeze(-1)
    values = (groups * factors).view(matrix.shape)
    return values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn), exponents.to(torch.uint8)


class _Mxfp8Product:
    """``flashinfer.mm_mxfp8``: only asked where it runs."""

    def is_backend_supported(self, backend: str, capability: int | None = None) -> bool:
        """As its ``backend_requirement`` says for SM100, SM103 and SM120."""
        return {"cute-dsl": {100, 103}, "trtllm": {100, 103}, "cutlass": {100, 103, 110, 120, 121}}.get(
            backend, set()
        ) >= {capability}

    def __call__(self, *_args: object, **_how: object) -> torch.Tensor:
        raise NotImplementedError("the stand-in GPU multiplies no matrices")


BY_NAME["mm_mxfp8"] = _Mxfp8Product()


@emulates(
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "deepseek-ai/DeepGEMM csrc/jit_kernels/impls/smxx_layout.hpp",
    "main branch",
)
def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: torch.Tensor) -> torch.Tensor:
    """Scales ``[E, mn, k]`` or ``[mn, k]`` float32 to their exponents, four to an int32 ``[..., mn, ceil(k / 4)]``.

    Down columns, each at a multiple of 16 bytes. As sgl-deep-gemm hands it over, a last dimension of one element has a
    stride of 1.
    """
    assert sf.dim() in (2, 3) and sf.dtype == torch.float32
    batched = sf if sf.dim() == 3 else sf.unsqueeze(0)
    batches, rows, columns = batched.shape
    if not batched.is_contiguous() and rows % 4 == 0 and batches == 1:
        assert batched.stride(1) == 1 and batched.stride(2) == rows
    on_current_device(sf)
    packed, height = -(-columns // 4), get_tma_aligned_size(rows, 4)
    exponents = (on_host(batched).contiguous().view(torch.int32) >> 23).to(torch.uint8)
    words = torch.nn.functional.pad(exponents, (0, -columns % 4)).contiguous().view(torch.int32)
    out = torch.empty_strided(
        (batches, rows, packed), (packed * height, 1, height), dtype=torch.int32, device=sf.device
    )
    on_host(out).copy_(words.view(batches, rows, packed))
    out = out if sf.dim() == 3 else out.squeeze(0)
    return out.as_strided(out.shape, (*out.stride()[:-1], 1)) if packed == 1 else out


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """Elements up to a multiple of 16 bytes."""
    return align(x, 16 // element_size)


def align(x: int, y: int) -> int:
    """``x`` up to a multiple of ``y``."""
    return -(-x // y) * y


def ceil_div(a: int, b: int) -> int:
    """CuTe's, where SGLang plans a launch."""
    return -(-a // b)


def set_pdl(enabled: bool) -> None:
    """DeepGEMM's switch for launches that overlap: there are none here."""


def get_num_sms() -> int:
    """DeepGEMM's own, which may be told to leave some to others, and here is not."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def is_arch_support_pdl() -> bool:
    """Whether launches may overlap: ``sgl_kernel.utils``, from Hopper on."""
    return torch.cuda.get_device_capability()[0] >= 9


for _helper in (get_tma_aligned_size, align, ceil_div, set_pdl, get_num_sms, is_arch_support_pdl):
    BY_NAME[_helper.__name__] = _helper


def _to_device(made: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    out = torch.empty(made.shape, dtype=made.dtype, device=like.device)
    on_host(out).copy_(made)
    return out
