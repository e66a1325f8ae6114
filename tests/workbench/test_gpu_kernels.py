# SPDX-License-Identifier: Apache-2.0
"""How kernels of a real GPU are compared with emulations: what equals, what fast division may do, and what fails."""

from __future__ import annotations

import pytest
import torch
from standin import kernels as emulations
from workbench.gpu import gpu_kernels
from workbench.gpu.gpu_kernels import Comparison

COLUMNS = 64


def quantizer(zeros_from: int = 0, off: int = 0):
    """A row quantizer on the CPU: rows of zeros stay zeros from so many rows on; codes are ``off`` by so many."""

    def quantize(values, output, scale):
        values = emulations.on_host(values).float()
        found = values.abs().amax(dim=1, keepdim=True) / 448
        inverse = 1 / found
        if len(values) >= zeros_from:
            inverse = torch.where(found == 0, 0.0, inverse)
        quantized = emulations.saturated(values * inverse).view(torch.uint8)
        quantized[20] ^= off
        emulations.on_host(output).copy_(quantized.view(torch.float8_e4m3fn))
        emulations.on_host(scale).copy_(found)

    return quantize


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(emulations, "on_host", lambda tensor: tensor)


@pytest.fixture
def values():
    values = torch.randn(40, COLUMNS, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    values[3:6] = 0
    return values


def compared(kernel, values):
    comparison = Comparison("a kernel", kernel, quantizer(), lambda rows: (rows, 1))
    return gpu_kernels._comparison_of(comparison, values)


def test_the_same_bytes_pass(values):
    assert compared(quantizer(), values)[:2] == (True, "the emulation's bytes")


def test_a_step_that_fast_division_may_make_passes_and_is_told(values):
    passed, detail, figures = compared(quantizer(off=1), values)
    assert passed
    assert figures == {"rows_of_other_values": 1, "other_scales": 0}
    assert "row 20 by 1" in detail


def test_more_than_that_fails_and_names_the_row(values):
    passed, detail, _ = compared(quantizer(off=4), values)
    assert not passed
    assert "row 20 by 4" in detail


def test_rows_of_zeros_that_become_something_else_fail(values):
    passed, detail, _ = compared(quantizer(zeros_from=1000), values)
    assert not passed
    assert "3 rows of values differ" in detail
    assert "(up to 0)" in detail


@pytest.mark.parametrize(("kernel", "passed"), [(quantizer(zeros_from=2000), True), (quantizer(), True)])
def test_halves_may_differ_in_rows_of_zeros(monkeypatch, kernel, passed):
    def samples(rows, columns):
        values = torch.ones(rows, columns, dtype=torch.bfloat16)
        values[:8] = 0
        return values

    monkeypatch.setattr(gpu_kernels, "samples", samples)
    comparison = Comparison("a kernel", kernel, kernel, lambda rows: (rows, 1))
    assert gpu_kernels._in_pieces(comparison)[1] is passed


def test_a_kernel_that_raises_is_a_failure_and_not_the_end(monkeypatch):
    def refuses(*_):
        raise RuntimeError("hidden_dim must be divisible by 8")

    monkeypatch.setattr(gpu_kernels, "samples", lambda rows, columns: torch.ones(rows, columns))
    comparison = Comparison("a kernel", refuses, refuses, lambda rows: (rows, 1))
    assert gpu_kernels._compared(comparison, 32, 4)[1:3] == (False, "RuntimeError: hidden_dim must be divisible by 8")
