# SPDX-License-Identifier: Apache-2.0
"""bf16 tensors into layers as each stand-in GPU has them: as of a fresh load, and nothing moves."""

from __future__ import annotations

import pytest
from workbench.loads.loads import compare
from workbench.loads.updates import Update

FILES = {"files": 3, "assignment": "round_robin"}


@pytest.mark.parametrize("source", ["disk", "tensor", "bucket"])
@pytest.mark.parametrize("family", [pytest.param("qwen3", marks=pytest.mark.every_release), "qwen3_moe", "deepseek_v3"])
def test_an_update_leaves_what_a_fresh_load_leaves(family, source, checkpoint, loaded):
    old, new = checkpoint(family, **FILES), checkpoint(family, **FILES, seed=1)
    updated = loaded("h200", old, updates=(Update(source, new),))
    (change,) = updated.ranks[0].updates
    assert (change.success, change.moved) == (True, ()), change.message
    assert compare(loaded("h200", new), updated) == []


def test_each_rank_updates_its_own_gpu(checkpoint, loaded):
    old, new = checkpoint("deepseek_v3", **FILES), checkpoint("deepseek_v3", **FILES, seed=1)
    updated = loaded("h200", old, tp_size=2, updates=(Update("disk", new),))
    assert all(change.success for rank in updated.ranks for change in rank.updates)
    assert compare(loaded("h200", new, tp_size=2), updated) == []
