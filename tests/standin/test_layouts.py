# SPDX-License-Identifier: Apache-2.0
"""Emulated layouts against the kernels' own index arithmetic, one element at a time.

Executed as a script by the test, in a process that has a stand-in GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from standin.gpus import environ


def marlin(words: torch.Tensor, size_k: int, size_n: int) -> torch.Tensor:
    """``repack_tile`` of gptq_marlin_repack.cuh, for 8 bits and no permutation; int64, one dimension."""
    out = torch.zeros(size_k * size_n // 4, dtype=torch.int64)
    n_tiles = size_n // 64
    for tile in range(size_k // 16 * n_tiles):
        k_tile, n_tile = divmod(tile, n_tiles)
        for thread in range(128):
            warp, lane = divmod(thread, 32)
            column, row = n_tile * 64 + warp * 16 + lane // 4, lane % 4 * 2
            for half in (0, 1):
                bytes_ = [_byte(words, k_tile * 16 + row + offset, column + 8 * half) for offset in (0, 1, 8, 9)]
                packed = sum(bytes_[index] << (8 * place) for place, index in enumerate((0, 2, 1, 3)))
                out[tile * 256 + lane * 8 + warp * 2 + half] = packed
    return out


def _byte(words: torch.Tensor, row: int, column: int) -> int:
    return int(words[row // 4, column]) >> (row % 4 * 8) & 255


def tiles(scales: torch.Tensor) -> torch.Tensor:
    """``get_sf_out_offset_128x4`` of FlashInfer's quantization.cuh, padded with zeros."""
    rows, columns = scales.shape
    wide = -(-columns // 4)
    out = torch.zeros(-(-rows // 128) * wide * 512, dtype=scales.dtype)
    for row in range(rows):
        for column in range(columns):
            tile = row // 128 * wide + column // 4
            out[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4] = scales[row, column]
    return out


def packed_exponents(scales: torch.Tensor) -> torch.Tensor:
    """As ``transpose_and_pack_fp32_into_ue8m0`` of DeepGEMM's smxx_layout.cuh: int64 ``[E, rows, words]``."""
    exponents = scales.view(torch.int32) >> 23
    experts, rows, columns = scales.shape
    out = torch.zeros(experts, rows, -(-columns // 4), dtype=torch.int64)
    for column in range(columns):
        out[..., column // 4] |= exponents[..., column].long() << (8 * (column % 4))
    return out


def check() -> None:
    """Compare them. Raises AssertionError where they differ."""
    from standin.kernels import BY_NAME

    words = torch.randint(-(2**31), 2**31, (12, 128)).to(torch.int32)
    out = torch.empty(3, 512, dtype=torch.int32, device="cuda")
    BY_NAME["gptq_marlin_repack"](words.cuda(), torch.empty(0, dtype=torch.int32, device="cuda"), out, 48, 128, 8)
    assert torch.equal(out.cpu().view(-1).long() & 0xFFFFFFFF, marlin(words, 48, 128))
    for shape in ((256, 8), (130, 5)):
        scales = torch.randint(0, 256, shape, dtype=torch.uint8)
        assert torch.equal(BY_NAME["block_scale_interleave"](scales.cuda()).cpu(), tiles(scales))
    rows = BY_NAME["get_shuffle_matrix_a_row_indices"](torch.empty(64, 4), 128)
    # srcToDstBlk32RowMap: row 1 of a block goes to place 8, row 4 to place 1.
    assert rows[8] == 1 and rows[1] == 4 and rows[32 + 31] == 63 and sorted(rows.tolist()) == list(range(64))
    for shape, stride in (((3, 7, 9), (24, 1, 8)), ((2, 8, 3), (8, 1, 1))):
        exponents = torch.rand(shape)
        packed = BY_NAME["get_mn_major_tma_aligned_packed_ue8m0_tensor"](exponents.cuda())
        assert packed.stride() == stride
        assert torch.equal(packed.cpu().long() & 0xFFFFFFFF, packed_exponents(exponents))


def test_emulated_layouts_follow_the_kernels_own_arithmetic():
    done = subprocess.run(
        [sys.executable, __file__], env={**os.environ, **environ("b200")}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("shape", [(48, 96), (40, 64)])
def test_marlin_refuses_what_its_kernel_refuses(shape):
    from standin.kernels import BY_NAME

    size_k, size_n = shape
    words = torch.zeros(size_k // 4, size_n, dtype=torch.int32)
    with pytest.raises(AssertionError, match="is not divisible by"):
        BY_NAME["gptq_marlin_repack"](words, torch.empty(0), torch.empty(0), size_k, size_n, 8)


if __name__ == "__main__":
    check()
