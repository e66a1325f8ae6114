# SPDX-License-Identifier: Apache-2.0
"""Weight updates end where a fresh load of the new weights ends, in the memory that was being served all along.

The workers' updates go through SGLang's own ``WeightUpdater``, those of the server and the engine through everything.
"""

from __future__ import annotations

import re
from functools import cache
from shutil import copytree

import pytest
from safetensors.torch import load_file, save_file
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


@pytest.mark.parametrize("source", ["disk", "tensors in many calls"])
def test_update_of_two_ranks_ends_as_a_fresh_load(source, update, fresh):
    result = update("deepseek_v3", (SEED, SOURCES[source]), tp_size=2)
    assert all(rank.updates[0].success and rank.updates[0].moved == () for rank in result.ranks)
    assert compare(fresh("deepseek_v3", 2), result) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_many_updates_in_a_row_end_where_the_last_one_does(family, update, fresh):
    steps = [(2, SOURCES["disk"]), (0, SOURCES["flattened buckets"]), (SEED, SOURCES["tensors in many calls"])]
    result = update(family, *steps)
    assert [done.success for done in result.ranks[0].updates] == [True, True, True]
    assert [done.moved for done in result.ranks[0].updates] == [(), (), ()]
    assert compare(fresh(family, 1), result) == []


PARTS = {
    "qwen3": r"layers\.1\.self_attn|layers\.0\.mlp\.down_proj|norm",
    "qwen3_moe": r"layers\.1\.mlp\.experts\.[35]\.|layers\.0\.mlp\.experts\.\d\.down_proj|embed",
    "deepseek_v3": r"layers\.1\.self_attn\.kv_b_proj|layers\.2\.mlp\.experts\.4\.|layers\.0\.self_attn\.q_a|"
    r"layers\.0\.self_attn\.kv_a_proj",
}


@pytest.mark.parametrize("source", ["disk", "tensors in many calls", "flattened buckets"])
@pytest.mark.parametrize("family", FAMILIES)
def test_partial_update_replaces_its_units_and_leaves_all_others(family, source, update, workers, checkpoint, tmp_path):
    result = update(family, (SEED, {**SOURCES[source], "names": PARTS[family]}))
    assert result.ranks[0].updates[0].success
    assert result.ranks[0].updates[0].moved == ()
    mixed = mixture(checkpoint(family), checkpoint(family, seed=SEED), PARTS[family], tmp_path / "mixed")
    assert compare(workers.load(LoadJob(mixed, streaming="require", prompts=PROMPTS)), result) == []


def mixture(old, new, names, folder):
    """A checkpoint with the tensors of ``new`` where ``names`` is found in their names, of ``old`` elsewhere."""
    copytree(old, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        replaced = {name: tensor for name, tensor in load_file(new / file.name).items() if re.search(names, name)}
        assert replaced
        save_file({**tensors, **replaced}, file, metadata={"format": "pt"})
    return folder


HALVES = {
    "qwen3": (r"layers\.1\.self_attn\.q_proj", "model.layers.1.self_attn.qkv_proj.weight (1 of 1 units)"),
    "qwen3_moe": (r"layers\.2\.mlp\.experts\.[25]\.up_proj", "model.layers.2.mlp.experts.w13_weight (2 of 8 units)"),
    "deepseek_v3": (r"layers\.2\.self_attn\.q_a_proj", "model.layers.2.self_attn.fused_qkv_a_proj_with_mqa.weight"),
}


@pytest.mark.parametrize("source", ["disk", "tensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_a_unit_is_an_error_that_names_it_and_keeps_the_old_values(family, source, update, workers, checkpoint):
    names, named = HALVES[family]
    result = update(family, (SEED, {**SOURCES[source], "names": names}))
    (done,) = result.ranks[0].updates
    assert not done.success
    assert named in done.message
    assert "All fp8 layers hold their old values" in done.message
    assert done.moved == ()
    assert compare(workers.load(LoadJob(checkpoint(family), streaming="require", prompts=PROMPTS)), result) == []
