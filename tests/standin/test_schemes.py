# SPDX-License-Identifier: Apache-2.0
"""Experts in schemes for which SGLang has no quantization method of its own."""

from __future__ import annotations

import pytest
from workbench.loads.job import LoadJob


@pytest.mark.parametrize("scheme", ["channel", "int8"])
@pytest.mark.parametrize("gpu", ["h200", "b200"])
def test_experts_have_the_bits_that_they_have_on_a_cpu(gpu, scheme, zeros, workers, loaded):
    """On a CPU ``schemes/test_schemes.py`` holds them to the formula, ``offline/export/test_export.py`` to stock."""
    path = zeros("qwen3_moe")
    fields = {"environ": {"SGLANG_STREAMFP8_SCHEME": f'{{"moe": "{scheme}"}}'}}
    results = workers.load(LoadJob(path, streaming="require", **fields)), loaded(gpu, path, **fields)
    experts = [
        {name: print_.sha256 for name, print_ in result.ranks[0].tensors.items() if ".experts." in name}
        for result in results
    ]
    assert experts[0] == experts[1]
    assert len(experts[0]) >= 4
