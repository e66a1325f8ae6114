# SPDX-License-Identifier: Apache-2.0
"""What is streamed: SGLang's own fp8 over a high-precision checkpoint, and nothing that only resembles it."""

from __future__ import annotations

import pytest
from sglang.srt.layers.quantization.fp8 import Fp8Config

from sglang_overlay.load import eligibility


class LookAlike(Fp8Config):
    """Of another quantization, with rules of its own."""


def with_fp4_experts():
    config = Fp8Config()
    config.is_fp4_experts = True
    return config


def test_plain_fp8_config_is_streamed():
    assert eligibility.is_online_fp8(Fp8Config())


@pytest.mark.parametrize(
    "config",
    [
        lambda: None,
        LookAlike,
        with_fp4_experts,
        lambda: Fp8Config(is_checkpoint_fp8_serialized=True),
        lambda: Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[128, 128]),
    ],
    ids=["none", "subclass", "fp4 experts", "serialized", "serialized block"],
)
def test_what_only_looks_like_online_fp8_is_left_alone(config):
    assert not eligibility.is_online_fp8(config())


def test_deferred_layer_says_what_reads_it():
    assert "w_kc" in eligibility.why_deferred("model.layers.0.self_attn.kv_b_proj")
    assert eligibility.why_deferred("model.layers.0.self_attn.kv_a_proj_with_mqa") is None
