# SPDX-License-Identifier: Apache-2.0
"""The compiled loops round as torch does, for every bfloat16 value and any scale."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys

import pytest
import torch

from sglang_overlay.cpu_reference import kernels

EVERY_VALUE = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def quantize(values, multiplier, out):
    kernels.quantize(kernels.source(values), multiplier, kernels.target(out))


def populate(out):
    matrix = kernels.target(out)
    kernels._compiled().populate(matrix.address, matrix.stride, matrix.rows, matrix.columns)


def largest(values):
    return kernels.largest(kernels.source(values))


FINITE = EVERY_VALUE[torch.isfinite(EVERY_VALUE)]
LARGEST = sorted({2.0**power * factor for power in range(-100, 120, 4) for factor in (1.0, 1.1171875, 1.75)})


@pytest.mark.parametrize("by_reciprocal", [False, True])
def test_every_value_gets_torchs_bits(by_reciprocal):
    for largest in LARGEST:
        values = FINITE[FINITE.abs() <= largest].contiguous()
        absmax = values.abs().max().float()
        multiplier = 1 / (absmax / 448) if by_reciprocal else 448 / absmax
        out = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
        quantize(values, float(multiplier), out)
        expected = (values.float() * multiplier).to(torch.float8_e4m3fn)
        assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8)), largest


@pytest.mark.parametrize("columns", [1, 31, 32, 33, 127, 128, 129, 300])
def test_rows_of_any_length_are_converted_whole_and_nothing_beside_them(columns):
    around = torch.randn(5, 340, generator=torch.Generator().manual_seed(columns)).to(torch.bfloat16)
    target = torch.full((5, 320), 7.0).to(torch.float8_e4m3fn)
    values, out = around[:, 9 : 9 + columns], target[:, 3 : 3 + columns]
    expected = target.clone()
    expected[:, 3 : 3 + columns] = values.to(torch.float8_e4m3fn)
    quantize(values, 1.0, out)
    assert torch.equal(target.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("shape", [(1,), (129,), (3, 127), (2, 4, 128), (7, 300)])
@pytest.mark.parametrize("special", [0.0, -3e38, float("inf"), float("-inf"), float("nan"), -(2.0**-133)])
def test_largest_finds_the_one_value_wherever_it_is(shape, special):
    for place in range(0, torch.Size(shape).numel(), 17):
        values = torch.full(shape, 1e-40, dtype=torch.bfloat16)
        values.view(-1)[place] = special
        found = largest(values)
        assert torch.tensor(found).isnan() if special != special else found == float(values.abs().max())


def test_largest_sees_nothing_between_the_rows():
    around = torch.full((4, 300), 9.0, dtype=torch.bfloat16)
    around[:, 8:200] = -2.0
    assert largest(around[:, 8:200]) == 2.0


def test_only_bfloat16_and_fp8_in_rows_is_taken():
    values, out = torch.ones(8, 8, dtype=torch.bfloat16), torch.empty(8, 8, dtype=torch.float8_e4m3fn)
    assert kernels.source(values)[1:] == kernels.target(out)[1:] == (8, 8, 8)
    assert kernels.source(values[:, 2:6])[1:] == (8, 4, 8)
    assert kernels.source(values.t()) is None
    assert kernels.source(values.unsqueeze(0)[:, :, :4]) is None
    assert kernels.source(values.float()) is None
    assert kernels.source(values[:0]) is None
    assert kernels.source(values.to("meta")) is None
    assert kernels.target(out.t()) is None
    assert kernels.target(out.to(torch.float8_e5m2)) is None


def test_torch_converts_where_nothing_can_be_compiled(monkeypatch):
    def fail():
        raise ImportError("no llvmlite")

    monkeypatch.setattr(kernels, "compile_loops", fail)
    kernels._compiled_once.cache_clear()
    try:
        assert kernels.source(torch.ones(8, dtype=torch.bfloat16)) is None
    finally:
        kernels._compiled_once.cache_clear()


@pytest.mark.parametrize("columns", [slice(None), slice(0, 1024)])
def test_fresh_memory_gets_its_pages_at_once_and_nothing_beside_it(columns):
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 16 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    out = torch.frombuffer(memory, dtype=torch.float8_e4m3fn).view(-1, page // 2)[6:13, columns]
    populate(out)
    resident = (ctypes.c_ubyte * 16)()
    start = ctypes.c_void_p(out.data_ptr() - 3 * page)
    assert ctypes.CDLL(None).mincore(start, ctypes.c_size_t(16 * page), resident) == 0
    assert list(resident) == [0] * 3 + [1] * 4 + [0] * 9


def test_memory_that_cannot_get_its_pages_at_once_is_filled_all_the_same(tmp_path):
    values = FINITE[FINITE.abs() <= 448].contiguous()
    file = tmp_path / "out"
    file.write_bytes(bytes(len(values)))
    # The kernel refuses to give pages beyond the end of a file.
    with file.open("r+b") as opened:
        memory = mmap.mmap(opened.fileno(), 0)
    whole = torch.frombuffer(memory, dtype=torch.float8_e4m3fn)
    assert kernels._compiled().populate(whole.data_ptr(), 1, 1, 1 << 40) is None
    quantize(values, 1.0, whole)
    assert torch.equal(whole.view(torch.uint8), values.to(torch.float8_e4m3fn).view(torch.uint8))


def test_loops_are_compiled_when_sglang_makes_the_platform_ready(tmp_path):
    code = "import sglang.srt.model_executor.model_runner; from sglang_overlay.cpu_reference import kernels\n"
    code += "print(kernels._compiled_once.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split()[-1] == "1"
