# SPDX-License-Identifier: Apache-2.0
"""What ``SGLANG_STREAMFP8_SCHEME`` can say, and what it cannot."""

from __future__ import annotations

import pytest

from sglang_overlay.errors import SettingsError
from sglang_overlay.schemes.choice import SchemeChoice, matches, parse

VARIABLE = "SGLANG_STREAMFP8_SCHEME"
QKV = ["model.layers.0.self_attn.qkv_proj", *(f"model.layers.0.self_attn.{part}_proj" for part in "qkv")]


def test_nothing_is_stock():
    assert parse("", VARIABLE).is_stock
    assert parse(" stock ", VARIABLE).is_stock


def test_name_is_the_scheme_of_all_layers():
    assert parse("block", VARIABLE) == SchemeChoice("block", "block")


def test_json_chooses_by_kind_and_leaves_the_rest_to_stock():
    assert parse('{"moe": "block"}', VARIABLE) == SchemeChoice("stock", "block")


def test_ignored_layers_are_overridden_with_none_first():
    choice = parse('{"overrides": {"b": "block"}, "ignore": ["a"]}', VARIABLE)
    assert list(choice.overrides.items()) == [("a", "none"), ("b", "block")]
    assert not choice.is_stock


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"moe": "block"', "no valid JSON"),
        ('{"experts": "block"}', "no key 'experts'"),
        ('{"moe": 8}', "names of schemes"),
        ('{"ignore": "lm_head"}', "a list"),
        ('{"ignore": [""]}', "a list"),
        ('{"overrides": ["lm_head"]}', "maps patterns"),
        ('{"overrides": {"lm_head": null}}', "maps patterns"),
        ('{"ignore": ["re:(("]}', "no regular expression"),
    ],
)
def test_anything_else_says_what_is_wrong(text, said):
    with pytest.raises(SettingsError, match=said) as raised:
        parse(text, VARIABLE)
    assert VARIABLE in str(raised.value)


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("o_proj", "model.layers.0.self_attn.o_proj", True),
        ("self_attn.o_proj", "model.layers.0.self_attn.o_proj", True),
        ("proj", "model.layers.0.self_attn.o_proj", False),
        ("model.layers.1", "model.layers.1.mlp.down_proj", False),
        ("re:.*down_proj", "model.layers.1.mlp.down_proj", True),
        ("re:down_proj", "model.layers.1.mlp.down_proj", False),
        ("re:model.layers.1", "model.layers.1.mlp.down_proj", True),
    ],
)
def test_pattern_is_a_name_the_end_of_one_or_an_expression(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_first_pattern_that_matches_counts():
    choice = SchemeChoice(overrides={"re:.*qkv": "tensor", "qkv_proj": "channel"})
    assert choice.override(QKV) == "re:.*qkv"


def test_fused_layer_is_matched_by_all_of_its_parts():
    assert SchemeChoice(overrides={r"re:.*\.[qkv]_proj": "none"}).override(QKV) == r"re:.*\.[qkv]_proj"
    assert SchemeChoice(overrides={"o_proj": "none"}).override(QKV) is None


def test_part_of_a_fused_layer_alone_is_an_error():
    with pytest.raises(SettingsError, match=r"'q_proj' matches .*q_proj, but .*qkv_proj is one layer"):
        SchemeChoice(overrides={"q_proj": "none"}).override(QKV)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("block", "block"),
        ('{"linear": "channel", "moe": "block"}', "linear channel, moe block"),
        ('{"linear": "block", "moe": "block", "ignore": ["lm_head"]}', "block, 1 pattern"),
    ],
)
def test_choice_has_a_short_text(given, text):
    assert parse(given, VARIABLE).text == text
