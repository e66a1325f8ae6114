# SPDX-License-Identifier: Apache-2.0
"""Load after load, and update after update, nothing is left. ``STREAMFP8_SOAK_LOADS`` sets how many of each."""

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
    """Assert that memory, tensors, threads and open files have not grown since they settled."""

    def check(held, cycles):
        settled, last = held[SETTLED - 1], held[-1]
        told = f"{settled} after {SETTLED} cycles, {last} after {len(held)}"
        record_property("held", told)
        print(told)
        assert len(held) == cycles
        assert last.memory <= 1.01 * settled.memory
        assert (last.tensors, last.threads, last.files) == (settled.tensors, settled.threads, settled.files)

    return check


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", SPECS)
def test_many_loads_leave_what_a_few_leave(family, checkpoint, tmp_path, steady):
    steady(soak(checkpoint(**SPECS[family]), tmp_path, LOADS), LOADS)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", SPECS)
def test_many_updates_leave_what_a_few_leave(family, checkpoint, tmp_path, steady):
    old, new = (checkpoint(**SPECS[family], seed=seed) for seed in (0, 1))
    updates = (
        Update("disk", new),
        Update("disk", old, names=r"layers\.1\.self_attn|norm"),
        Update("tensor", old, calls=5, order="shuffled"),
        Update("bucket", new, names=r"layers\.1\.mlp\.experts\.[12]\.|layers\.0\.self_attn", calls=2),
    )
    steady(soak_updates(old, updates, tmp_path, LOADS), LOADS)
