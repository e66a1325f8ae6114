# SPDX-License-Identifier: Apache-2.0
"""Updates with values that a trainer has quantized itself: taken to the bit with their scales, or refused by name."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from workbench.exports import ExportJob, run_export
from workbench.loads import PROMPTS, LoadJob, compare
from workbench.mutations import altered
from workbench.updates import Update

from sglang_overlay.settings import SCHEME_VARIABLE

SEED = 1
BLOCKS = (("hidden_size", 256), ("intermediate_size", 512), ("moe_intermediate_size", 256), ("head_dim", 128))
"""Sizes that divide into blocks of 128 over two ranks."""
SOURCES = {
    "disk": {"source": "disk"},
    "tensors": {"source": "tensor"},
    "buckets": {"source": "bucket"},
}


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    """The new weights of a family, quantized by a scheme as trainers send them."""

    @cache
    def export(family, scheme, overrides=()):
        folder = tmp_path_factory.mktemp("exported") / "out"
        run_export(ExportJob(checkpoint(family, seed=SEED, overrides=overrides), folder, scheme))
        return folder

    return export


@pytest.fixture
def load(workers, checkpoint):
    """A streamed load of a family's weights by a scheme, with updates."""

    def run(family, scheme, *updates, seed=0, overrides=(), **fields):
        environ = {SCHEME_VARIABLE: scheme} if scheme else {}
        path = checkpoint(family, seed=seed, overrides=overrides)
        return workers.load(
            LoadJob(path, streaming="require", environ=environ, updates=updates, prompts=PROMPTS, **fields)
        )

    return run


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("family", "scheme"), [("qwen3", "block"), ("qwen3_moe", "block"), ("qwen3_moe", "channel")])
def test_values_with_scales_in_the_layout_that_is_served_are_taken_to_the_bit(family, scheme, source, load, exported):
    result = load(family, scheme, Update(checkpoint=exported(family, scheme), **SOURCES[source]))
    assert_taken(result, load(family, scheme, seed=SEED))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_each_rank_takes_its_part_of_values_and_scales(family, load, exported):
    sizes = {"overrides": BLOCKS, "tp_size": 2}
    result = load(family, "block", Update("tensor", exported(family, "block", BLOCKS)), **sizes)
    assert_taken(result, load(family, "block", seed=SEED, **sizes))


def assert_taken(result, fresh):
    """Every rank has updated in place, and ends as a fresh load of the new weights."""
    for rank in result.ranks:
        (done,) = rank.updates
        assert done.success, done.message
        assert done.moved == ()
    assert compare(fresh, result) == []


def test_stocks_scheme_takes_linear_layers_with_a_scale_a_channel(load, exported):
    names = "proj"
    result = load("qwen3", "channel", Update("tensor", exported("qwen3", "channel"), names=names))
    assert result.ranks[0].updates[0].success, result.ranks[0].updates[0].message
    new = load("qwen3", "channel", seed=SEED).ranks[0].tensors
    found = result.ranks[0].tensors
    assert {name for name in new if names in name and found[name] != new[name]} == set()


def refused(result, *named):
    """All updates failed, each naming what is wrong."""
    answers = result.ranks[0].updates
    assert [done.success for done in answers] == [False] * len(answers)
    for done, names in zip(answers, named, strict=True):
        assert all(name in done.message for name in names), done.message
        assert "All weights are those of before this update." in done.message
        assert "KeyError" not in done.message.partition(":")[0]
        assert ".." not in done.message


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_values_in_another_layout_are_refused_and_nothing_has_changed(family, load, exported):
    block = exported(family, "block")
    updates = [Update(checkpoint=block, **how) for how in SOURCES.values()]
    updates.append(Update("tensor", block, names=r"layers\.0\.self_attn\.o_proj"))
    result = load(family, "", *updates)
    refused(result, *[["float8_e4m3fn"]] * 3, ["o_proj.weight", "float8_e4m3fn"])
    assert compare(load(family, ""), result) == []


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_values_without_scales_are_refused_and_nothing_has_changed(family, load, checkpoint, tmp_path):
    def cast(dtype):
        def change(tensors):
            for name in [name for name in tensors if "o_proj" in name or "kv_b_proj" in name or "norm" in name]:
                tensors[name] = tensors[name].to(dtype)

        return altered(checkpoint(family, seed=SEED), tmp_path / str(dtype), change)

    parts = ["o_proj", "layernorm", *(["kv_b_proj"] if family == "deepseek_v3" else [])]
    updates, named = [], []
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        folder = cast(dtype)
        updates += [Update("disk", folder), *(Update("tensor", folder, names=part) for part in parts)]
        updates.append(Update("direct", folder, names="o_proj"))
        named += [["float8"], *([part] for part in parts), ["o_proj"]]
    result = load(family, "", *updates)
    refused(result, *named)
    assert compare(load(family, ""), result) == []


def test_half_of_values_and_scales_is_an_error_that_names_it(load, exported):
    block = exported("qwen3_moe", "block")
    updates = [
        Update("tensor", block, names=r"o_proj\.weight$"),
        Update("tensor", block, names=r"o_proj\.weight_scale_inv"),
        Update("disk", block, names=r"experts\.[13]\.down_proj\.weight$"),
        Update("tensor", block, names=r"layers\.0\.mlp\.experts\.1\.(up_proj|gate_proj\.weight$)"),
    ]
    result = load("qwen3_moe", "block", *updates)
    refused(result, *[["o_proj.weight ("]] * 2, ["w2_weight ("], ["layers.0.mlp.experts.w13_weight ("])
    assert compare(load("qwen3_moe", "block"), result) == []
