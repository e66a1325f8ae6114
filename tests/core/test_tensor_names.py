# SPDX-License-Identifier: Apache-2.0
"""The names of missing tensors are told from experts and layers that have theirs."""

from __future__ import annotations

import pytest

from sglang_overlay.core.tensor_names import Misplaced, missing_names, prefix_changes


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


LAYERS = [f"model.layers.{layer}.{part}" for layer in range(3) for part in ("self_attn.qkv_proj", "mlp.experts")]


@pytest.mark.parametrize(
    ("names", "change"),
    [
        ("model.layers.0.self_attn.q_proj.weight", ""),
        ("_orig_mod.model.layers.0.self_attn.q_proj.weight", "leave out '_orig_mod.'"),
        ("module.model.layers.0.mlp.experts.1.up_proj.weight", "strip 'module.' from their beginning"),
        ("layers.2.self_attn.q_proj.weight", "put 'model.' before them"),
        (
            "language_model.layers.1.self_attn.q_proj.weight",
            "begin them with 'model.' in place of 'language_model.'",
        ),
        (
            "a.model.layers.1._fsdp_wrapped_module.mlp._orig_mod.experts.w1 a.model.layers.0.self_attn.q_proj",
            "leave out '_fsdp_wrapped_module.', '_orig_mod.' and strip 'a.' from their beginning",
        ),
    ],
)
def test_change_that_makes_names_fit_is_told(names, change):
    found = Misplaced.among(names.split(), LAYERS)
    assert found.names == names.split()
    assert found.change == change


def test_change_that_sglang_makes_itself_is_not_told():
    """GLM-Image's vision tower: its checkpoint has ``fc1`` where SGLang looks for ``linear_fc1``."""
    written = {
        "visual.blocks.0.attn.qkv_proj": {"model.visual.blocks.0.attn.qkv.weight"},
        "model.layers.0.mlp.gate_up_proj": {"model.language_model.layers.0.mlp.gate_proj.weight"},
    }
    changes = prefix_changes(written)
    assert changes == {("model.", ""), ("model.language_model.", "model.")}
    unused = ["model.visual.blocks.0.mlp.fc1.weight"]
    found = Misplaced.among(unused, ["visual.blocks.0.mlp.linear_fc1"], changes)
    assert (found.names, found.change) == (unused, "")


def test_change_that_fits_the_most_names_is_told():
    names = [f"x.{layer}.q_proj.weight" for layer in LAYERS]
    assert Misplaced.among(["y.layers.0.self_attn.bias", *names], LAYERS).names == names


@pytest.mark.parametrize("name", ["epoch", "self_attn.q_proj.weight", "model.layers.7.self_attn.q", "visual.0.mlp"])
def test_names_that_have_no_layer_in_them_are_none_of_its_own(name):
    assert Misplaced.among([name], LAYERS) == Misplaced([], "")


@pytest.mark.parametrize("last", ["qweight", "weight_packed", "weight_scale_inv"])
def test_packed_tensors_are_told_to_be_quantized(last):
    found = Misplaced.among([f"model.layers.0.self_attn.q_proj.{last}"], LAYERS)
    assert "quantized already" in found.advice
