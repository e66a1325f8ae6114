# SPDX-License-Identifier: Apache-2.0
"""Weight updates end where a fresh load of the new weights ends, in the memory that was being served all along.

The workers' updates go through SGLang's own ``WeightUpdater``, those of the server and the engine through everything.
"""

from __future__ import annotations

from functools import cache

import pytest
from workbench.loads import PROMPTS, LoadJob, compare
from workbench.updates import Update

FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3")
SEED = 1

SOURCES = {
    "disk": {"source": "disk"},
    "tensors": {"source": "tensor"},
    "tensors in many calls": {"source": "tensor", "calls": 7, "order": "shuffled"},
    "flattened buckets": {"source": "bucket", "calls": 3},
}


@pytest.fixture(scope="session")
def fresh(workers, checkpoint):
    """A fresh streamed load of the new weights of a family, with greedy outputs; loaded once."""

    @cache
    def load(family, tp_size):
        path = checkpoint(family, seed=SEED)
        return workers.load(LoadJob(path, streaming="require", tp_size=tp_size, prompts=PROMPTS))

    return load


@pytest.fixture
def update(workers, checkpoint):
    """A streamed load of a family's old weights, updated."""

    def run(family, *updates, tp_size=1, **fields):
        made = tuple(Update(checkpoint=checkpoint(family, seed=seed), **how) for seed, how in updates)
        job = LoadJob(checkpoint(family), streaming="require", tp_size=tp_size, updates=made, prompts=PROMPTS, **fields)
        return workers.load(job)

    return run


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_update_ends_as_a_fresh_load_in_the_same_memory(family, source, update, fresh):
    result = update(family, (SEED, SOURCES[source]))
    (done,) = result.ranks[0].updates
    assert done.success, done.message
    assert done.moved == ()
    assert compare(fresh(family, 1), result) == []
