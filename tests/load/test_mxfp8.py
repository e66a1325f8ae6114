# SPDX-License-Identifier: Apache-2.0
"""``--quantization mxfp8`` streams, and serves what stock SGLang makes of the checkpoint by itself, to the bit."""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import cache

import pytest
import torch
from harness.streamed import assert_streamed, load_reported, warnings_of
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, LoadFailed, compare
from workbench.loads.updates import Update

MLA = (("q_lora_rank", 128),)
FAMILIES = {"qwen3": (), "qwen2_moe": (), "qwen3_moe": (), "deepseek_v3": MLA}
LAYOUTS = {
    "one file": {},
    "an expert's shards apart": {"files": 7, "assignment": "round_robin"},
    "shuffled": {"files": 7, "assignment": "shuffled", "file_names": "shuffled"},
}
MANY = LAYOUTS["shuffled"]


def needs_experts(family):
    """Before 0.5.17 a platform could not choose another runner for MXFP8 experts than FlashInfer's."""
    arguments = importlib.import_module("sglang.srt.server_args")
    if family != "qwen3" and not hasattr(arguments, "add_mxfp8_moe_runner_backend_choices"):
        pytest.skip("MXFP8 experts need a GPU in this release")


@pytest.fixture(scope="session")
def stock(workers, checkpoint):
    """The stock load of a family at one parallel layout, with greedy outputs; loaded once."""

    @cache
    def load(family, tp_size=1, ep_size=1):
        needs_experts(family)
        path = checkpoint(family, overrides=FAMILIES[family])
        parallel = {"tp_size": tp_size, "ep_size": ep_size}
        return workers.load(LoadJob(path, streaming="0", quantization="mxfp8", prompts=PROMPTS, **parallel))

    return load


@pytest.fixture
def stream(workers, checkpoint, tmp_path_factory):
    """A load that has to be streamed; ``fields`` are the job's."""

    def load(family, layout=MANY, **fields):
        path = checkpoint(family, overrides=FAMILIES[family], **layout)
        job = LoadJob(path, streaming="require", quantization="mxfp8", **fields)
        result, reports = load_reported(workers.load, job, tmp_path_factory.mktemp("reports"))
        assert_streamed(reports, job.ranks)
        assert {report.scheme for report in reports} == {"mxfp8"}
        return result

    return load


@pytest.mark.every_release
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_greedy_outputs_equal_stock(family, tp_size, stock, stream):
    wanted = stock(family, tp_size)
    result = stream(family, tp_size=tp_size, prompts=PROMPTS)
    assert compare(wanted, result) == []
    assert result.ranks[0].logits_finite


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_any_layout_on_disk_gives_stock_weights(family, layout, stock, stream):
    assert compare(stock(family), stream(family, LAYOUTS[layout])) == []


def test_expert_parallel_gives_stock_weights(stock, stream):
    assert compare(stock("qwen3_moe", 2, 2), stream("qwen3_moe", tp_size=2, ep_size=2, prompts=PROMPTS)) == []


def test_every_matrix_is_e4m3_with_an_exponent_for_32_values(stream):
    tensors = stream("qwen3_moe").ranks[0].tensors
    stored = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items() if ".layers.0." in name}
    assert stored["model.layers.0.self_attn.o_proj.weight"] == (str(torch.float8_e4m3fn), (256, 256))
    assert stored["model.layers.0.self_attn.o_proj.weight_scale_inv"] == (str(torch.uint8), (256, 8))
    assert stored["model.layers.0.mlp.experts.w2_weight_scale_inv"] == (str(torch.uint8), (8, 256, 4))


def test_dummy_weights_equal_stock(workers, checkpoint):
    fields = {"quantization": "mxfp8", "server_args": {"load_format": "dummy"}, "prompts": PROMPTS}
    job = LoadJob(checkpoint("qwen3_moe"), streaming="require", **fields)
    assert compare(workers.load(replace(job, streaming="0")), workers.load(job)) == []


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_update_ends_as_a_fresh_load(family, stream, checkpoint):
    new = {"seed": 1}
    fresh = stream(family, new, prompts=PROMPTS)
    path = checkpoint(family, overrides=FAMILIES[family], **new)
    updated = stream(family, updates=(Update("disk", path),), prompts=PROMPTS)
    assert [(update.success, update.moved) for update in updated.ranks[0].updates] == [(True, ())]
    assert compare(fresh, updated) == []


def test_layer_that_cannot_be_streamed_is_stocks(odd_workers, workers, checkpoint):
    plain = LoadJob(checkpoint("qwen3"), streaming="0", quantization="mxfp8", prompts=PROMPTS)
    path = checkpoint("qwen3", overrides=(("architectures", ("AddingLoaderForCausalLM",)),))
    result = odd_workers.load(replace(plain, checkpoint=path, streaming="1"))
    assert compare(workers.load(plain), result) == []
    (warning,) = warnings_of(result)
    assert "model.layers.1.mlp.down_proj is loaded as in stock SGLang" in warning


def test_checkpoint_in_mxfp8_is_left_alone(workers, checkpoint, tmp_path):
    job = LoadJob(checkpoint("qwen3", stored="fp8_block"), streaming="1", quantization=None)
    _, reports = load_reported(workers.load, job, tmp_path)
    assert {report.mode for report in reports} == {"stock"}


def test_scheme_of_fp8_is_an_error(workers, checkpoint):
    environ = {"SGLANG_STREAMFP8_SCHEME": "block"}
    job = LoadJob(checkpoint("qwen3"), quantization="mxfp8", environ=environ)
    with pytest.raises(LoadFailed, match=r"SGLANG_STREAMFP8_SCHEME=block chooses a scheme of --quantization fp8"):
        workers.load(job)


@pytest.mark.memory
def test_peak_is_little_above_the_loaded_model_and_below_six_tenths_of_stock(workers, checkpoint):
    path = checkpoint("qwen3_moe", size="bench_2g", files=4)
    job = LoadJob(path, streaming="require", quantization="mxfp8", described="sizes")
    stock, streaming = (workers.load_fresh(one).ranks[0] for one in (replace(job, streaming="0"), job))
    assert stock.model_bytes == streaming.model_bytes
    assert streaming.memory.peak_above_start <= 1.05 * streaming.model_bytes
    assert streaming.memory.peak_above_start <= 0.60 * stock.memory.peak_above_start
