# SPDX-License-Identifier: Apache-2.0
"""However SGLang has placed a model on several ranks, an update ends as a fresh load, also where experts have moved."""

from __future__ import annotations

import json
from functools import cache

import pytest
from harness.mutations import altered
from update.test_updates import BAD, SEED, SESSIONS, SOURCES
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, compare
from workbench.loads.rebalance import Rebalance
from workbench.loads.updates import Update

from sglang_overlay.hooks.update_hooks import BEFORE_UPDATE

WAYS = pytest.mark.parametrize("source", [pytest.param("disk", marks=pytest.mark.nightly), "tensors in many calls"])

PLACES = {
    "expert parallel": ("qwen3_moe", {"tp_size": 2, "ep_size": 2, "prompts": PROMPTS}),
    "pipeline parallel": ("qwen3_moe", {"pp_size": 2}),
    "data parallel attention": (
        "deepseek_v3",
        {"tp_size": 2, "server_args": {"enable_dp_attention": True, "dp_size": 2}},
    ),
}


@pytest.fixture(scope="module")
def load(workers, checkpoint):
    """A streamed load, made once."""

    @cache
    def run(family, seed, place):
        return workers.load(LoadJob(checkpoint(family, seed=seed), streaming="require", **PLACES[place][1]))

    return run


@WAYS
@pytest.mark.parametrize("place", PLACES)
def test_update_ends_as_a_fresh_load(place, source, load, workers, checkpoint):
    family, fields = PLACES[place]
    update = Update(checkpoint=checkpoint(family, seed=SEED), **SOURCES[source])
    result = workers.load(LoadJob(checkpoint(family), streaming="require", updates=(update,), **fields))
    for rank in result.ranks:
        assert rank.updates[0].success, rank.updates[0].message
        assert rank.updates[0].moved == ()
    assert compare(load(family, SEED, place), result) == []


SLOTS = (3, 0, 7, 1, 5, 2, 6, 4, 3, 0)
"""The expert in each slot of two ranks after a rebalance; before it they are in order, and the first two come twice."""
LAYERS = 3


EXPERTS = {
    "streaming": "require",
    "tp_size": 2,
    "ep_size": 2,
    "server_args": {"ep_num_redundant_experts": 2, "ep_dispatch_algorithm": "dynamic"},
}


@pytest.fixture(scope="module")
def placed(workers, checkpoint):
    """A load of weights with experts in ``SLOTS``, or in order."""

    @cache
    def run(seed, *, moved):
        places = {"init_expert_location": json.dumps({"physical_to_logical_map": [SLOTS] * LAYERS})}
        options = {**EXPERTS["server_args"], **(places if moved else {})}
        return workers.load(LoadJob(checkpoint("qwen3_moe", seed=seed), **{**EXPERTS, "server_args": options}))

    return run


class TestMovedExperts:
    @pytest.fixture
    def update(self, workers, checkpoint):
        def run(*steps):
            return workers.load(LoadJob(checkpoint("qwen3_moe"), updates=steps, **EXPERTS))

        return run

    @pytest.fixture
    def misshapen(self, checkpoint, tmp_path):
        """New weights, of which one has too few rows."""
        name = BAD["qwen3_moe"]
        return altered(
            checkpoint("qwen3_moe", seed=SEED),
            tmp_path / "misshapen",
            lambda tensors: tensors.update({name: tensors[name][:1]}),
        )

    @WAYS
    def test_each_slot_is_updated(self, source, update, placed, checkpoint):
        new, other = checkpoint("qwen3_moe", seed=SEED), checkpoint("qwen3_moe", seed=2)
        result = update(Update("disk", other), Rebalance(SLOTS), Update(checkpoint=new, **SOURCES[source]))
        for rank in result.ranks:
            first, moved, second = rank.updates
            assert (first.success, second.success) == (True, True), (first.message, second.message)
            assert moved.placements == (SLOTS,) * LAYERS
            assert second.moved == ()
        assert compare(placed(SEED, moved=True), result) == []

    def test_each_slot_goes_back_where_an_update_fails(self, update, placed, misshapen):
        result = update(Rebalance(SLOTS), Update("disk", misshapen))
        for rank in result.ranks:
            assert BEFORE_UPDATE in rank.updates[1].message
        assert compare(placed(0, moved=True), result) == []

    @SESSIONS
    def test_experts_stay_while_an_update_is_open(self, update, placed, checkpoint):
        """What has come of an expert is for the slots that it had then. The next rebalance moves them."""
        shuffled = {**SOURCES["tensors in many calls"], "placement": SLOTS}
        result = update(Update(checkpoint=checkpoint("qwen3_moe", seed=SEED), **shuffled), Rebalance(SLOTS))
        for rank in result.ranks:
            assert rank.updates[0].success, rank.updates[0].message
            assert rank.updates[1].placements == (SLOTS,) * LAYERS
        assert compare(placed(SEED, moved=True), result) == []

    @SESSIONS
    def test_experts_that_stay_go_back_where_the_update_fails(self, update, placed, misshapen):
        result = update(Update("tensor", misshapen, calls=3, placement=SLOTS))
        for rank in result.ranks:
            assert BEFORE_UPDATE in rank.updates[0].message
        assert compare(placed(0, moved=False), result) == []
