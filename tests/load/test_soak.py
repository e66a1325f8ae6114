# SPDX-License-Identifier: Apache-2.0
"""Load after load, and update after update, no memory is lost. ``STREAMFP8_SOAK_LOADS`` sets how many of each."""

from __future__ import annotations

import os

import pytest
from harness.fuzz import SPECS
from harness.soak import soak, soak_updates
from workbench.loads.updates import Update

LOADS = int(os.environ.get("STREAMFP8_SOAK_LOADS", "200"))
SETTLED = 20


@pytest.fixture
def steady(record_property):
    """Assert that memory has not grown since it settled."""

    def check(memory):
        told = f"{memory[SETTLED - 1]} bytes after {SETTLED} cycles, {memory[-1]} after {len(memory)}"
        record_property("memory", told)
        print(told)
        assert len(memory) == LOADS
        assert memory[-1] <= 1.01 * memory[SETTLED - 1]

    return check


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", SPECS)
def test_memory_after_many_loads_is_that_after_a_few(family, checkpoint, tmp_path, steady):
    steady(soak(checkpoint(**SPECS[family]), tmp_path, LOADS))


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", SPECS)
def test_memory_after_many_updates_is_that_after_a_few(family, checkpoint, tmp_path, steady):
    old, new = (checkpoint(**SPECS[family], seed=seed) for seed in (0, 1))
    updates = (
        Update("disk", new),
        Update("disk", old, names=r"layers\.1\.self_attn|norm"),
        Update("tensor", old, calls=5, order="shuffled"),
        Update("bucket", new, names=r"layers\.1\.mlp\.experts\.[12]\.|layers\.0\.self_attn", calls=2),
    )
    steady(soak_updates(old, updates, tmp_path, LOADS))
