# SPDX-License-Identifier: Apache-2.0
"""Updates of layers that upstream has rearranged for a kernel: all of a layer at once, or nothing of it.

``test_backends.py`` has one full update of each.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from harness.trainer import has_sessions
from workbench.loads.loads import compare
from workbench.loads.update_rule import RandomUpdates
from workbench.loads.updates import Update

from standin.conftest import Surroundings
from standin.test_backends import BOTH, Case, experts, job_of

ONE_LAYER = {"overrides": (("num_hidden_layers", 1),)}
QKV = "model.layers.0.self_attn.qkv_proj"


def test_a_part_of_a_layer_is_refused_by_name_and_all_of_it_is_taken_in_any_order(checkpoint, loaded):
    old, new = checkpoint("qwen2_moe", **ONE_LAYER), checkpoint("qwen2_moe", **ONE_LAYER, seed=1)
    updates = (
        Update("tensor", new, names=r"layers\.0.*(q_proj\.weight|[qkv]_proj\.bias)"),
        Update("tensor", new, names=r"layers\.0.*[qkv]_proj\.weight"),
        Update("bucket", new, calls=3 if has_sessions() else 1, order="shuffled"),
        Update("disk", old),
    )
    updated = loaded("a100", old, updates=updates)
    part, no_bias, *whole = updated.ranks[0].updates
    assert f"only a part came: {QKV}.weight (" in part.message and f"only a part came: {QKV}.bias" in no_bias.message
    assert [change.success for change in (part, no_bias, *whole)] == [False, False, True, True]
    assert not any(change.moved for change in updated.ranks[0].updates)
    assert compare(loaded("a100", old), updated) == []
    assert compare(loaded("a100", new), loaded("a100", old, updates=updates[:3])) == []


@pytest.mark.nightly
def test_random_updates_hold_what_they_answer(checkpoint, loaded):
    paths = tuple(checkpoint("qwen3", **ONE_LAYER, seed=seed) for seed in range(3))
    (result,) = loaded("a100", paths[0], updates=(RandomUpdates(paths, (), 0, 150),)).ranks[0].updates
    assert result.broken == []


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("there", "case"),
    [
        (Surroundings("a100"), Case("qwen3", scheme="block")),
        (Surroundings("b200", BOTH), experts("deep_gemm", scheme="block")),
        (Surroundings("mi355x-aiter"), experts("auto", scheme="block")),
    ],
    ids=["a100", "b200", "mi355x-aiter"],
)
def test_values_with_scales_are_rearranged_too(there, case, loads_in, checkpoint):
    serialized = checkpoint(case.family, **ONE_LAYER, seed=1, stored="fp8_block")
    stock = replace(job_of(case, serialized), streaming="0", environ={}, quantization=None)
    old = job_of(case, checkpoint(case.family, **ONE_LAYER))
    updated = loads_in(there, replace(old, updates=(Update("tensor", serialized),)))
    (change,) = updated.ranks[0].updates
    assert (change.success, change.moved) == (True, ()), change.message
    assert compare(loads_in(there, stock), updated) == []
