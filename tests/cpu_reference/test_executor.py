# SPDX-License-Identifier: Apache-2.0
"""Which quantizers the CPU reference replaces: those of upstream's own kernels, and no others."""

from __future__ import annotations

import pytest
from sglang.srt.layers.quantization import fp8

from sglang_overlay.core.quantizers import RowKernelQuantizer, RowQuantizer, WholeUnitQuantizer
from sglang_overlay.cpu_reference.executor import on_cpu
from sglang_overlay.cpu_reference.per_tensor import PerTensorQuantizer


@pytest.mark.parametrize("name", ["input_to_float8", "scaled_fp8_quant", "per_token_group_quant_fp8"])
def test_upstreams_kernels_are_replaced(name):
    is_rows = name == "per_token_group_quant_fp8"
    function = getattr(fp8, name)
    made = on_cpu(RowKernelQuantizer(function, 8) if is_rows else WholeUnitQuantizer(function))
    assert type(made) is (RowQuantizer if is_rows else PerTensorQuantizer)


@pytest.mark.parametrize("make", [WholeUnitQuantizer, lambda function: RowKernelQuantizer(function, 8)])
def test_quantizer_with_a_function_of_its_own_stays(make):
    quantizer = make(lambda values: (values, values))
    assert on_cpu(quantizer) is quantizer
