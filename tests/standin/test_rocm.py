# SPDX-License-Identifier: Apache-2.0
"""On AMD's stand-in GPUs, with aiter and without: what stock leaves, updates, and what is refused by name."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys

import pytest
import torch
from harness.trainer import has_sessions
from triton.runtime import interpreter
from workbench.loads.loads import compare
from workbench.loads.updates import Update
from workbench.quality import families

from sglang_overlay.schemes import capabilities
from standin.aiter import shuffle_weight
from standin.gpus import environ

FP8 = {
    "mi300x": torch.float8_e4m3fnuz,
    "mi300x-per-token": torch.float8_e4m3fnuz,
    "mi355x-aiter": torch.float8_e4m3fn,
}
"""What a GPU's fp8 is. MI300X's has another exponent bias, and 224 is the largest value of it that SGLang uses."""
SMALL = {
    # aiter's GEMM takes multiples of 64 output channels, so some weights are shuffled and others not; q, k and v of 48,
    # 8 and 8 rows are fused, and 16 rows are shuffled among each other.
    "qwen3": {
        "num_hidden_layers": 1,
        "hidden_size": 96,
        "intermediate_size": 96,
        "head_dim": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
    },
    # aiter pads experts to 128 rows of intermediate size.
    "qwen3_moe": {"num_hidden_layers": 1, "hidden_size": 64, "moe_intermediate_size": 96, "head_dim": 16},
    "deepseek_v3": {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64},
}
"""Few rows: the kernel per token is Triton's, whose interpreter takes milliseconds for each."""
FILES = {"files": 3, "assignment": "round_robin"}
FNUZ = pytest.mark.skipif(
    "fp8e4b8" not in inspect.getsource(interpreter._patch_lang_core),
    reason="this Triton's interpreter cannot convert to e4m3fnuz; that of 3.8 can",
)
QUANTIZED_BY_TRITON = [pytest.param(gpu, marks=FNUZ if gpu == "mi300x-per-token" else ()) for gpu in FP8]
CACHE = re.compile(r"\.attn_m[hq]a\.[kv]_scale")
AUTO = {"moe_runner_backend": "auto"}
BLOCK = {"SGLANG_STREAMFP8_SCHEME": "block"}


@pytest.fixture(scope="session")
def small(checkpoint):
    """A family's checkpoint of few rows."""
    return lambda family, **fields: checkpoint(family, overrides=tuple(SMALL[family].items()), **FILES, **fields)


def dtypes(result):
    return {tensor.dtype for tensor in result.ranks[0].tensors.values() if "float8" in tensor.dtype}


@pytest.mark.patched
@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("gpu", QUANTIZED_BY_TRITON)
def test_streaming_leaves_what_stock_leaves(gpu, family, small, loaded):
    stock, streamed = (loaded(gpu, small(family), streaming=mode, server_args=AUTO) for mode in ("0", "require"))
    assert compare(stock, streamed) == []
    assert dtypes(streamed) == {str(FP8[gpu])}


@pytest.mark.patched
@pytest.mark.parametrize("gpu", FP8)
def test_experts_in_one_tensor_with_biases(gpu, loaded, checkpoint_folder):
    path = families.build("GptOssForCausalLM", checkpoint_folder)
    arguments = {**families.server_args("GptOssForCausalLM"), **AUTO}
    stock, streamed = (loaded(gpu, path, streaming=mode, server_args=arguments) for mode in ("0", "require"))
    assert compare(stock, streamed) == []


@FNUZ
def test_a_load_per_token_is_shuffled_where_aiter_has_a_kernel(small, loaded):
    ways = [loaded(gpu, small("qwen3"), server_args=AUTO).ranks[0] for gpu in ("mi300x", "mi300x-per-token")]
    shapes = [way.tensors["model.layers.0.mlp.gate_up_proj.weight_scale"].shape for way in ways]
    assert shapes == [(), (1, 192)]
    assert ways[1].flags["model.layers.0.mlp.gate_up_proj.quant_method.use_per_token_if_dynamic"] == "True"


def test_padding_against_channel_contention(small, loaded):
    path, padded = small("qwen3_moe"), {"environ": {"SGLANG_MOE_PADDING": "1"}}
    stock, streamed = (loaded("mi300x", path, streaming=mode, **padded) for mode in ("0", "require"))
    assert streamed.ranks[0].tensors["model.layers.0.mlp.experts.w13_weight"].shape[-1] == 64 + 128
    assert compare(stock, streamed) == []
    updated = loaded("mi300x", small("qwen3_moe", seed=1), updates=(Update("disk", path),), **padded)
    assert compare(streamed, updated) == []


@pytest.mark.parametrize("source", ["disk", "bucket"])
@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("gpu", QUANTIZED_BY_TRITON)
def test_an_update_leaves_what_a_fresh_load_leaves(gpu, family, source, small, loaded):
    old, new = small(family), small(family, seed=1)
    calls = 3 if has_sessions() else 1
    changes = (Update("bucket", new, calls=calls, order="shuffled") if source == "bucket" else Update("disk", new),)
    updated = loaded(gpu, old, updates=changes, server_args=AUTO)
    (change,) = updated.ranks[0].updates
    assert (change.success, change.moved) == (True, ()), change.message
    # Where fp8 is e4m3fnuz, stock doubles the key-value cache's scales whenever it post-processes a model again.
    differences = [line for line in compare(loaded(gpu, new, server_args=AUTO), updated) if not CACHE.search(line)]
    assert differences == []


@FNUZ
def test_rows_that_are_shuffled_among_each_other_are_sent_together(small, loaded):
    old, new = small("qwen3"), small("qwen3", seed=1)
    updated = loaded("mi300x-per-token", old, updates=(Update("tensor", new, names="k_proj"),), server_args=AUTO)
    (change,) = updated.ranks[0].updates
    assert not change.success
    assert "only a part came: model.layers.0.self_attn.qkv_proj.weight (1 of 4 units)" in change.message
    assert compare(loaded("mi300x-per-token", old, server_args=AUTO), updated) == []


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("gpu", ["mi300x", "mi355x-aiter"])
def test_block_is_what_stock_has_after_loading_a_block_fp8_checkpoint_and_updates_go_there_and_back(
    gpu, family, checkpoint, loaded
):
    sizes = {"overrides": (("num_hidden_layers", 1),)}
    serialized = loaded(gpu, checkpoint(family, stored="fp8_block", **sizes), streaming="0", server_args=AUTO)
    path = checkpoint(family, **sizes)
    assert compare(serialized, loaded(gpu, path, environ=BLOCK, server_args=AUTO)) == []
    changes = (Update("disk", checkpoint(family, seed=1, **sizes)), Update("tensor", path))
    updated = loaded(gpu, path, environ=BLOCK, server_args=AUTO, updates=changes)
    assert [(change.success, change.moved) for change in updated.ranks[0].updates] == [(True, ())] * 2
    assert [line for line in compare(serialized, updated) if not CACHE.search(line)] == []


def test_unshuffle_undoes_what_aiter_does():
    weight = torch.arange(2 * 32 * 64).to(torch.uint8).view(2, 32, 64)
    shuffled = shuffle_weight(weight, (16, 16))
    assert not torch.equal(shuffled, weight)
    assert torch.equal(capabilities.unshuffle(shuffled), weight)


REFUSED = """
from sglang_overlay.hooks import scheme_hooks
from sglang_overlay.schemes import granularity, int8
from sglang_overlay.schemes.choice import SchemeChoice
from sglang_overlay.schemes.scheme import LayerKind
from sglang_overlay.load import eligibility
print(granularity.CHANNEL.why_not(LayerKind.LINEAR))
print(granularity.TENSOR.why_not(LayerKind.LINEAR))
print(int8.INT8.why_not(LayerKind.EXPERTS))
print(eligibility.why_not_platform())
print(scheme_hooks.what_else(SchemeChoice("block"), "block", LayerKind.LINEAR, "qkv_proj"))
"""


def test_what_is_not_covered_is_named():
    variables = {**os.environ, **environ("mi300x-aiter"), "SGLANG_INT4_WEIGHT": "1"}
    done = subprocess.run([sys.executable, "-c", REFUSED], env=variables, capture_output=True, text=True, check=True)
    channel, tensor, experts, platform, advice = done.stdout.splitlines()[-5:]
    assert "SGLANG_USE_AITER_FP8_PER_TOKEN=1" in channel
    assert (tensor, experts) == ("None", "it has not been run on ROCm")
    assert platform == "SGLANG_INT4_WEIGHT has experts in int4"
    assert advice == 'Leave layers of this kind in bf16 with "ignore": ["qkv_proj"].'
