# SPDX-License-Identifier: Apache-2.0
"""Every ``--load-format`` either streams with stock's result or says why not."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace

import pytest
from harness.streamed import assert_streamed, load_reported
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, LoadFailed, compare

from sglang_overlay.observe.report import read_folder

FAMILIES = ["qwen3", "qwen3_moe", "deepseek_v3"]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("multithread", [True, False], ids=["threads", "one thread"])
def test_bin_checkpoint_streams(multithread, family, both, checkpoint):
    path = checkpoint(family, container="bin", files=5, assignment="round_robin")
    stock, result, reports = both(path, loader_config={"enable_multithread_load": multithread})
    assert compare(stock, result) == []
    assert_streamed(reports)


def test_pt_format_streams(both, checkpoint, tmp_path):
    path = _copied(checkpoint("qwen3_moe", container="bin"), tmp_path)
    (weights,) = path.glob("*.bin")
    weights.rename(weights.with_suffix(".pt"))
    stock, result, reports = both(path, server_args={"load_format": "pt"})
    assert compare(stock, result) == []
    assert_streamed(reports)


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_safetensors_format_streams(load_format, both, checkpoint):
    stock, result, reports = both(checkpoint("qwen3_moe", files=3), server_args={"load_format": load_format})
    assert compare(stock, result) == []
    assert_streamed(reports)


def test_mistral_format_streams(both, checkpoint, tmp_path):
    path = _copied(checkpoint("qwen3"), tmp_path)
    (path / "model.safetensors").rename(path / "consolidated.safetensors")
    stock, result, reports = both(path, server_args={"load_format": "mistral"})
    assert compare(stock, result) == []
    assert_streamed(reports)


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_weights_are_stocks(family, both, checkpoint):
    # Before 0.5.14, MLA absorbs dummy weights that are fp8 already, and its kernels for those are Triton's.
    prompts = () if family == "deepseek_v3" else PROMPTS
    stock, result, reports = both(checkpoint(family), server_args={"load_format": "dummy"}, prompts=prompts)
    assert compare(stock, result) == []
    assert_streamed(reports)


@pytest.mark.needs("sglang.srt.model_loader.loader.PreshardedModelLoader.load_model")
@pytest.mark.parametrize("tp_size", [1, 2])
def test_presharded_dump_and_what_is_loaded_from_it_are_stocks(tp_size, workers, checkpoint, tmp_path):
    path = checkpoint("qwen3_moe")
    fields = {"tp_size": tp_size, "server_args": {"load_format": "presharded"}}
    loaded = {}
    for streaming in ("0", "require"):
        config = {"presharded_path": str(tmp_path / streaming)}
        for step in ("dump", "load"):
            reports = {"SGLANG_STREAMFP8_REPORT": str(tmp_path / f"reports-{step}")} if streaming != "0" else {}
            job = LoadJob(path, streaming=streaming, loader_config=config, environ=reports, **fields)
            loaded[streaming, step] = workers.load(job)
    assert compare(loaded["0", "dump"], loaded["require", "dump"]) == []
    assert compare(loaded["0", "load"], loaded["require", "load"]) == []
    for step in ("dump", "load"):
        assert_streamed(read_folder(tmp_path / f"reports-{step}"), tp_size)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_sharded_state_saves_and_loads_back(family, tp_size, workers, checkpoint, tmp_path):
    path = checkpoint(family)
    saved = shutil.copytree(path, tmp_path / "saved", ignore=shutil.ignore_patterns("*.safetensors"))
    loaded = workers.load(LoadJob(path, streaming="require", tp_size=tp_size, save_sharded_state=saved))
    job = LoadJob(saved, tp_size=tp_size, server_args={"load_format": "sharded_state"}, prompts=PROMPTS)
    try:
        stock = workers.load(replace(job, streaming="0"))
    except LoadFailed as error:
        if "in _filter_subtensors" in str(error):
            pytest.skip("this release cannot load linear layers that it has quantized itself from sharded state")
        raise
    result, reports = load_reported(workers.load, replace(job, streaming="require"), tmp_path / "reports")
    assert compare(stock, result) == []
    # SGLang notes this when it loads experts by their own loaders, which these files do without.
    assert [line for line in compare(loaded, result) if "use_padded_loading" not in line] == []
    assert_streamed(reports, tp_size)


def test_layered_format_names_the_loader(workers, checkpoint):
    path = checkpoint("qwen3")
    with pytest.raises(LoadFailed, match=r"SGLANG_STREAMFP8=require.*LayeredModelLoader"):
        workers.load(LoadJob(path, streaming="require", server_args={"load_format": "layered"}))


def test_model_without_fp8_layers_loads_layer_by_layer(workers, checkpoint):
    path = checkpoint("qwen3", overrides=(("architectures", ("TorchNativeLlamaForCausalLM",)), ("model_type", "llama")))
    # Stock reads the checkpoint for the first module and leaves the others as they are, rotary tables too.
    job = LoadJob(path, server_args={"load_format": "layered"}, uninitialized=math.nan)
    stock, result = (workers.load(replace(job, streaming=mode)) for mode in ("0", "require"))
    assert [line for line in compare(stock, result) if "cos_sin_cache" not in line] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_runai_streamer_streams(family, workers, both, checkpoint):
    pytest.importorskip("runai_model_streamer")
    path = checkpoint(family, files=3, assignment="round_robin")
    stock, result, reports = both(path, server_args={"load_format": "runai_streamer"})
    plain = workers.load(LoadJob(path, streaming="0"))
    assert compare(stock, result) == []
    assert compare(plain, result) == []
    assert_streamed(reports)


def _copied(checkpoint, folder):
    return shutil.copytree(checkpoint, folder / "copy")
