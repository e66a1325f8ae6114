# SPDX-License-Identifier: Apache-2.0
"""The names of missing tensors are told from experts and layers that have theirs."""

from __future__ import annotations

import pytest

from sglang_overlay.core.tensor_names import missing_names


def experts(layer, ids=range(4), prefix="model.layers"):
    shards = ("gate_proj", "up_proj", "down_proj")
    return {f"{prefix}.{layer}.mlp.experts.{expert}.{shard}.weight" for expert in ids for shard in shards}


def test_one_shard_of_an_expert_is_told_from_its_others():
    lost = "model.layers.2.mlp.experts.2.up_proj.weight"
    assert missing_names("model.layers.2.mlp.experts", {"model.layers.2.mlp.experts": experts(2) - {lost}}) == [lost]


def test_whole_expert_is_told_from_another_layer():
    written = {"model.layers.2.mlp.experts": experts(2, [0, 1, 3]), "model.layers.3.mlp.experts": experts(3)}
    assert set(missing_names("model.layers.2.mlp.experts", written)) == experts(2, [2])


def test_whole_layer_is_told_from_another_layer_of_the_same_kind():
    written = {
        "model.layers.3.self_attn.qkv_proj": {f"model.layers.3.self_attn.{part}_proj.weight" for part in "qkv"},
        "model.layers.3.self_attn.o_proj": {"model.layers.3.self_attn.o_proj.weight"},
    }
    assert missing_names("model.layers.2.self_attn.qkv_proj", written) == [
        f"model.layers.2.self_attn.{part}_proj.weight" for part in "kqv"
    ]


def test_layer_number_is_not_taken_for_an_expert_number():
    written = {"layers.1.mlp.experts": experts(1, prefix="layers"), "layers.0.mlp.experts": ()}
    assert set(missing_names("layers.0.mlp.experts", written)) == experts(0, prefix="layers")


def test_names_in_the_checkpoint_may_have_another_prefix_than_in_the_model():
    written = {
        "language_model.model.layers.7.mlp.down_proj": {"model.language_model.layers.7.mlp.down_proj.weight"},
        "language_model.model.layers.12.mlp.down_proj": (),
    }
    assert missing_names("language_model.model.layers.12.mlp.down_proj", written) == [
        "model.language_model.layers.12.mlp.down_proj.weight"
    ]


def test_numbers_within_words_are_left_alone():
    written = {"h.1.fc1": {"h.1.fc1.weight"}, "h.0.fc1": ()}
    assert missing_names("h.0.fc1", written) == ["h.0.fc1.weight"]


@pytest.mark.parametrize("names", [experts(2), {"odd{}name", "{0}.5.{x}"}, ()])
def test_nothing_is_told_where_nothing_tells(names):
    assert missing_names("model.layers.2.mlp.experts", {"model.layers.2.mlp.experts": names}) == []
    assert missing_names("model.layers.2.mlp.experts", {"model.layers.3.mlp.gate_up_proj": names}) == []


def test_names_come_in_the_order_of_their_numbers():
    written = {"layers.2.mlp.experts": experts(2, range(12), "layers"), "layers.3.mlp.experts": ()}
    found = missing_names("layers.3.mlp.experts", written)
    assert [int(name.split(".")[4]) for name in found] == sorted(int(name.split(".")[4]) for name in found)
