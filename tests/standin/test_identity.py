# SPDX-License-Identifier: Apache-2.0
"""On each stand-in GPU, streaming leaves what stock leaves: bytes, strides, classes, and every flag on a layer."""

from __future__ import annotations

import pytest
from workbench.loads.loads import compare

pytestmark = [pytest.mark.every_release, pytest.mark.patched]

GPUS = ("l4", "h200", "h200-1g", "rtx5090")
"""Those with nothing of their own; ``test_backends.py`` and ``test_rocm.py`` have the others."""
FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3")
ODD = {
    "qwen3": (("intermediate_size", 296), ("hidden_size", 200)),
    "qwen3_moe": (("moe_intermediate_size", 56), ("hidden_size", 200)),
}
"""Sizes that are no multiple of 16 or 128, but of 8: others are refused by old releases' own kernels."""


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("gpu", GPUS)
def test_streaming_leaves_what_stock_leaves(gpu, family, zeros, loaded):
    path = zeros(family)
    assert compare(loaded(gpu, path, streaming="0"), loaded(gpu, path)) == []


@pytest.mark.parametrize("family", ODD)
def test_sizes_that_are_no_multiple_of_a_block(family, zeros, loaded):
    path = zeros(family, overrides=ODD[family])
    assert compare(loaded("h200", path, streaming="0"), loaded("h200", path)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_each_rank_has_a_gpu(family, zeros, loaded):
    path = zeros(family)
    stock, streamed = (loaded("h200", path, streaming=mode, tp_size=2) for mode in ("0", "require"))
    devices = [{one.device for one in rank.tensors.values()} for rank in streamed.ranks]
    assert devices == [{"cuda:0"}, {"cuda:1"}]
    assert compare(stock, streamed) == []
