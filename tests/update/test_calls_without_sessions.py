# SPDX-License-Identifier: Apache-2.0
"""SGLang before 0.5.21 has no update sessions: trainers send buckets that end between tensors that share a scale."""

from __future__ import annotations

import pytest
from harness.mutations import altered
from harness.streamed import warnings_of
from update.test_updates import BEGIN, SEED
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, compare
from workbench.loads.updates import Update

from sglang_overlay.hooks import releases
from sglang_overlay.hooks.update_hooks import BEFORE_CALL, BEFORE_UPDATE

pytestmark = [
    pytest.mark.every_release,
    pytest.mark.skipif(BEGIN not in releases.absent(), reason="this release requires sessions"),
]

Q, K_AND_V, OUT, REST = "q_proj", "[kv]_proj", "o_proj", r"^(?!.*\.[qkvo]_proj)"
WAIT = "keep their values until later calls bring what shares their scales"
DROPPED = "another weight update begins, and of these weights the one before has brought only a part"


@pytest.fixture(scope="module")
def paths(checkpoint, tmp_path_factory):
    """Of weights: old, new, yet others, and new ones of which one has too few rows."""

    def shorten(tensors):
        name = next(name for name in tensors if "k_proj" in name)
        tensors[name] = tensors[name][:-1].clone()

    old, new, others = (checkpoint("qwen3", seed=seed) for seed in (0, SEED, 2))
    return old, new, others, altered(new, tmp_path_factory.mktemp("misshapen") / "new", shorten)


@pytest.fixture
def update(workers, paths):
    """Calls, each with the tensors in whose names something is found; they end where a fresh load of the new does."""

    def run(*calls, tp_size=1):
        updates = tuple(
            Update("disk", path) if names == "disk" else Update("tensor", path, names=names) for names, path in calls
        )
        job = LoadJob(paths[0], streaming="require", tp_size=tp_size, updates=updates, prompts=PROMPTS)
        result = workers.load(job)
        fresh = workers.load(LoadJob(paths[1], streaming="require", tp_size=tp_size, prompts=PROMPTS))
        assert compare(fresh, result) == []
        return result

    return run


@pytest.mark.parametrize("tp_size", [1, 2])
def test_weights_wait_for_the_call_that_completes_them(tp_size, update, paths):
    _, new, _, _ = paths
    result = update((Q, new), (K_AND_V, new), (f"{OUT}|{REST}", new), tp_size=tp_size)
    first, *others = result.ranks[0].updates
    assert [answer.success for answer in (first, *others)] == [True, True, True]
    assert WAIT in first.message
    assert "model.layers.0.self_attn.qkv_proj.weight (1 of 1 units)" in first.message
    assert not any(WAIT in answer.message for answer in others)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_failed_call_goes_back_to_before_it_and_is_sent_again(tp_size, update, paths):
    _, new, _, misshapen = paths
    result = update((f"{Q}|{OUT}", new), (K_AND_V, misshapen), (K_AND_V, new), (REST, new), tp_size=tp_size)
    for rank in result.ranks:
        assert [answer.success for answer in rank.updates] == [True, False, True, True]
        assert BEFORE_CALL in rank.updates[1].message
        assert WAIT not in rank.updates[2].message


def test_first_call_that_fails_leaves_nothing_that_waits(update, paths):
    _, new, _, misshapen = paths
    result = update((f"{Q}|k_proj", misshapen), (f"{Q}|v_proj", new), ("k_proj", new), (f"{OUT}|{REST}", new))
    failed, waits, *_ = result.ranks[0].updates
    assert BEFORE_UPDATE in failed.message
    assert WAIT in waits.message


@pytest.mark.parametrize("way", ["tensor", "disk"])
def test_next_update_drops_what_still_waits(way, update, paths):
    """Parts of two updates would make a weight that no trainer has."""
    old, new, others, _ = paths
    again = (OUT, new) if way == "tensor" else ("disk", old)
    result = update((f"{Q}|{OUT}", others), again, (K_AND_V, new), (Q, new), (f"{OUT}|{REST}", new))
    assert all(answer.success for answer in result.ranks[0].updates)
    (warning,) = [line for line in warnings_of(result) if DROPPED in line]
    assert "qkv_proj" in warning
