# SPDX-License-Identifier: Apache-2.0
"""Rows in int8 against float64, whatever the dtype of the weights."""

from __future__ import annotations

import pytest
import torch

from sglang_overlay.schemes.int8 import INT8_MAX, Int8RowQuantizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 4, 96), (2, 700, 1000)])
def test_rows_agree_with_float64_and_their_source_stays_as_it_is(dtype, shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0, 1] = 0.0
    before = values.clone()
    out, scale = torch.empty(shape, dtype=torch.int8), torch.empty(shape[:2])
    found = Int8RowQuantizer().quantize_run(values, out, scale)
    assert torch.equal(values, before)
    exact = values.double()
    torch.testing.assert_close(found.double(), exact.abs().amax((1, 2)), rtol=0, atol=0)
    wanted = exact.abs().amax(2).clamp(min=1e-10) / INT8_MAX
    torch.testing.assert_close(scale.double(), wanted, rtol=2e-7, atol=0)
    assert ((out.double() - exact / wanted.unsqueeze(2)).abs() <= 0.5 + 1e-4).all()
