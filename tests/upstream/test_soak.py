# SPDX-License-Identifier: Apache-2.0
"""Load after load in one process, no memory is lost. ``STREAMFP8_SOAK_LOADS`` sets how many."""

from __future__ import annotations

import os

import pytest
from workbench.fuzz import SPECS
from workbench.soak import soak

LOADS = int(os.environ.get("STREAMFP8_SOAK_LOADS", "200"))
SETTLED = 20


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", SPECS)
def test_memory_after_many_loads_is_that_after_a_few(family, checkpoint, tmp_path, record_property):
    memory = soak(checkpoint(**SPECS[family]), tmp_path, LOADS)
    record_property("bytes", f"{memory[SETTLED - 1]} after {SETTLED} loads, {memory[-1]} after {LOADS}")
    print(f"{memory[SETTLED - 1]} bytes after {SETTLED} loads, {memory[-1]} after {LOADS}")
    assert len(memory) == LOADS
    assert memory[-1] <= 1.01 * memory[SETTLED - 1]
