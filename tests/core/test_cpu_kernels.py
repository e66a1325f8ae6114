# SPDX-License-Identifier: Apache-2.0
"""The compiled loops round as torch does, for every bfloat16 value and any scale."""

from __future__ import annotations

import pytest
import torch

from sglang_overlay.core import cpu_kernels

EVERY_VALUE = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
FINITE = EVERY_VALUE[torch.isfinite(EVERY_VALUE)]
LARGEST = sorted({2.0**power * factor for power in range(-100, 120, 4) for factor in (1.0, 1.1171875, 1.75)})


@pytest.fixture(autouse=True, scope="module")
def prepared():
    cpu_kernels.prepare().join()


@pytest.mark.parametrize("by_reciprocal", [False, True])
def test_every_value_gets_torchs_bits(by_reciprocal):
    for largest in LARGEST:
        values = FINITE[FINITE.abs() <= largest].contiguous()
        absmax = values.abs().max().float()
        multiplier = 1 / (absmax / 448) if by_reciprocal else 448 / absmax
        out = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
        cpu_kernels.quantize(values, float(multiplier), out)
        expected = (values.float() * multiplier).to(torch.float8_e4m3fn)
        assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8)), largest


def test_only_contiguous_bfloat16_is_taken():
    values, out = torch.ones(8, 8, dtype=torch.bfloat16), torch.empty(8, 8, dtype=torch.float8_e4m3fn)
    assert cpu_kernels.applies_to(values, out)
    assert not cpu_kernels.applies_to(values[:, :4], out[:, :4])
    assert not cpu_kernels.applies_to(values.float(), out)
    assert not cpu_kernels.applies_to(values, out.to(torch.float8_e5m2))
