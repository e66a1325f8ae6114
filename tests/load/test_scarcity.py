# SPDX-License-Identifier: Apache-2.0
"""Where memory runs out, for real, the error says what was needed and what streaming had allocated."""

from __future__ import annotations

import pytest
from harness.scarcity import load_with_little_memory

MIB = 1 << 20


@pytest.fixture(scope="module")
def outcomes(checkpoint, tmp_path_factory):
    """Loads of a 100 MiB checkpoint, from too little memory by far to enough of it."""
    wide = (("num_hidden_layers", 2), ("hidden_size", 1024), ("moe_intermediate_size", 1024))
    # Read into memory, not mapped, and an expert's shards apart: what is staged has to be copied.
    path = checkpoint("qwen3_moe", container="bin", files=3, assignment="round_robin", overrides=wide)
    allowances = [amount * MIB for amount in (*range(24, 240, 12), 600)]
    return load_with_little_memory(path, tmp_path_factory.mktemp("scarcity"), allowances)


def test_every_shortage_is_told_with_what_streaming_had_allocated(outcomes):
    failed = [outcome for outcome in outcomes if outcome.error]
    assert failed
    assert [outcome for outcome in failed if "Streaming had allocated" not in outcome.error] == []


@pytest.mark.parametrize("purpose", ["for the fp8 storage of model.layers.", "to stage a piece of model.layers."])
def test_what_memory_was_needed_for_is_told(purpose, outcomes):
    found = [outcome for outcome in outcomes if purpose in outcome.error]
    assert found
    for outcome in found:
        assert outcome.error.startswith("StagingMemoryError: memory ran out: ")
        assert "can't allocate memory" in outcome.cause


def test_nothing_is_held_or_left_running_afterwards(outcomes):
    assert [(outcome.threads, outcome.held) for outcome in outcomes] == [([], 0)] * len(outcomes)


def test_enough_memory_is_enough(outcomes):
    assert outcomes[-1].error == ""
