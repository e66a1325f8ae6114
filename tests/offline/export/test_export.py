# SPDX-License-Identifier: Apache-2.0
"""An exported checkpoint: stock SGLang, without the overlay, serves what an online load serves."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from harness.exports import ExportJob, ExportKilled, run_export
from harness.mutations import altered, pickled
from safetensors import safe_open
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, STORED_AS_FP8, LoadFailed, compare

from sglang_overlay.errors import ExportError, SchemeError

BLOCKS = (("hidden_size", 256), ("intermediate_size", 512), ("moe_intermediate_size", 128))
"""Sizes that divide into blocks of 128."""

FAMILIES = {
    "qwen3": BLOCKS,
    "qwen2_moe": (*BLOCKS, ("shared_expert_intermediate_size", 256)),
    "qwen3_moe": BLOCKS,
    "deepseek_v3": (*BLOCKS, ("q_lora_rank", 128)),
}
MANY = {"files": 4, "assignment": "shuffled"}


def contents(folder):
    """Every file but the journal, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def stored(folder, name):
    """A tensor of a checkpoint that has an index."""
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(folder / places[name], framework="pt") as file:
        return file.get_tensor(name)


def online(workers, path, scheme, **fields):
    return workers.load(LoadJob(path, environ={"SGLANG_STREAMFP8_SCHEME": scheme}, prompts=PROMPTS, **fields))


def stock(workers, path, **fields):
    return workers.load(LoadJob(path, streaming="0", quantization=None, prompts=PROMPTS, **fields))


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_loads_of_a_block_export_what_an_online_load_computes(family, workers, checkpoint, tmp_path):
    path = checkpoint(family, overrides=FAMILIES[family], **MANY)
    made = run_export(ExportJob(path, tmp_path / "out")).exported
    assert made.shards > 1
    assert made.stored_bytes < 0.62 * made.source_bytes
    found = compare(online(workers, path, "block"), stock(workers, tmp_path / "out"))
    assert [line for line in found if not any(flag in line for flag in STORED_AS_FP8)] == []


def test_json_of_the_command_is_what_it_has_written(checkpoint, tmp_path):
    path = checkpoint("qwen3", overrides=BLOCKS)
    arguments = ["--model-path", str(path), "--out", str(tmp_path / "out"), "--max-shard-gb", "0.001"]
    command = [sys.executable, "-m", "sglang_overlay", "export", *arguments, "--scheme", "block", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert (told["schema"], told["version"]) == ("sglang-streamfp8/export", 1)
    assert told["folder"] == str(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert told["stored_bytes"] == index["metadata"]["total_size"]
    assert told["shards"] == len(set(index["weight_map"].values()))
    assert told["quantized"] == sum(name.endswith("weight_scale_inv") for name in index["weight_map"])


def test_export_is_the_same_over_two_ranks(workers, checkpoint, tmp_path):
    path = checkpoint("qwen3", overrides=(*BLOCKS, ("head_dim", 128)), **MANY)
    run_export(ExportJob(path, tmp_path / "out"))
    expected = online(workers, path, "block", tp_size=2)
    assert compare(expected, stock(workers, tmp_path / "out", tp_size=2)) == []


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_channel_export_holds_the_weights_of_an_online_load(family, workers, checkpoint, tmp_path):
    path = checkpoint(family, overrides=FAMILIES[family], **MANY)
    run_export(ExportJob(path, tmp_path / "out", "channel"))
    expected, found = online(workers, path, "channel"), stock(workers, tmp_path / "out")
    tensors = [result.ranks[0].tensors for result in (expected, found)]
    weights = [{name: print_.sha256 for name, print_ in side.items() if "weight" in name} for side in tensors]
    assert weights[0] == weights[1]
    assert expected.tokens == found.tokens


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_channel_export_holds_the_weights_of_an_online_load_over_two_ranks(family, workers, checkpoint, tmp_path):
    path = checkpoint(family, overrides=FAMILIES[family], **MANY)
    run_export(ExportJob(path, tmp_path / "out", "channel"))
    expected = online(workers, path, "channel", streaming="require", tp_size=2)
    found = stock(workers, tmp_path / "out", tp_size=2)
    for pair in zip(expected.ranks, found.ranks, strict=True):
        weights = [{name: print_.sha256 for name, print_ in rank.tensors.items() if "weight" in name} for rank in pair]
        assert weights[0] == weights[1]
    assert expected.tokens == found.tokens
    record = json.loads((tmp_path / "out" / "streamfp8_export.json").read_text())
    assert record["scheme"] == "channel"
    assert record["same_as_online_loads"].startswith("at any tensor parallel size")


def test_config_says_what_is_quantized_as_published_checkpoints_do(checkpoint, tmp_path):
    path = checkpoint("deepseek_v3", overrides=FAMILIES["deepseek_v3"], **MANY)
    run_export(ExportJob(path, tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((path / "config.json").read_text())
    ignored = quantization.pop("modules_to_not_convert")
    assert quantization == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert {"lm_head", "model.layers.0.self_attn.kv_b_proj", "model.layers.1.mlp.gate"} <= set(ignored)
    assert not any("experts" in module for module in ignored)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    values, scales = stored(tmp_path / "out", name), stored(tmp_path / "out", f"{name}_scale_inv")
    assert (values.dtype, values.shape, scales.dtype, scales.shape) == (
        torch.float8_e4m3fn,
        (256, 128),
        torch.float32,
        (2, 1),
    )
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()


def test_layers_can_be_left_out(workers, checkpoint, tmp_path):
    path = checkpoint("qwen3", overrides=BLOCKS, **MANY)
    scheme = json.dumps({"linear": "block", "moe": "block", "ignore": ["model.layers.0.mlp.down_proj"]})
    run_export(ExportJob(path, tmp_path / "out", scheme))
    assert compare(online(workers, path, scheme), stock(workers, tmp_path / "out")) == []


def test_export_of_bin_files_is_the_same(checkpoint, tmp_path):
    for container in ("safetensors", "bin"):
        path = checkpoint("qwen3", overrides=BLOCKS, container=container)
        run_export(ExportJob(path, tmp_path / container, shard_bytes=1 << 30))
    assert contents(tmp_path / "safetensors") == contents(tmp_path / "bin")


def test_entries_of_a_bin_file_that_are_no_tensors_are_left_out_and_signs_are_kept(checkpoint, tmp_path):
    def strange(entries):
        entries.update({"epoch": 3, "config": {"a": 1}, "nothing": None})
        for name in [name for name in entries if "o_proj" in name or "norm" in name]:
            entries[name] = torch._neg_view(-entries[name])

    for name, change in {"plain": lambda _: None, "strange": strange}.items():
        path = pickled(checkpoint("qwen3", overrides=BLOCKS), tmp_path / "from" / name, change)
        run_export(ExportJob(path, tmp_path / name))
    assert contents(tmp_path / "plain") == contents(tmp_path / "strange")


def test_sparse_tensor_in_a_bin_file_is_refused_by_name(checkpoint, tmp_path):
    path = pickled(checkpoint("qwen3"), tmp_path / "in", lambda entries: entries.update(mask=torch.eye(2).to_sparse()))
    with pytest.raises(ExportError, match="mask is a tensor of layout sparse_coo"):
        run_export(ExportJob(path, tmp_path / "out"))


def test_export_of_float32_is_what_an_online_load_computes_in_bf16(workers, checkpoint, tmp_path):
    def widen(tensors):
        # Digits that bf16 does not keep, and that would change every scale.
        tensors.update({name: tensor.float() * (1 + 2**-10) for name, tensor in tensors.items()})

    path = altered(checkpoint("qwen3", overrides=BLOCKS), tmp_path / "wide", widen)
    run_export(ExportJob(path, tmp_path / "out"))
    assert stored(tmp_path / "out", "model.norm.weight").dtype == torch.float32
    assert compare(online(workers, path, "block"), stock(workers, tmp_path / "out")) == []


def test_weights_of_integers_are_refused(checkpoint, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    path = altered(
        checkpoint("qwen3", overrides=BLOCKS),
        tmp_path / "wrong",
        lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}),
    )
    with pytest.raises(ExportError, match=rf"{name}, which goes into .*qkv_proj.weight, is of dtype torch.int8"):
        run_export(ExportJob(path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_killed_export_is_no_model_and_goes_on_where_it_stopped(part, workers, checkpoint, tmp_path):
    path = checkpoint("qwen3_moe", overrides=BLOCKS, **MANY)
    whole = run_export(ExportJob(path, tmp_path / "whole"))
    target = tmp_path / "killed"
    with pytest.raises(ExportKilled):
        run_export(ExportJob(path, target, killed_after=int(part * whole.exported.stored_bytes)))
    assert not (target / "config.json").exists()
    with pytest.raises(LoadFailed):
        stock(workers, target)
    complete = {name: (tmp_path / "whole" / name).read_bytes() for name in contents(target)}
    assert contents(target) == complete
    resumed = run_export(ExportJob(path, target)).exported
    assert resumed.resumed == len(complete)
    assert contents(target) == contents(tmp_path / "whole")
    assert {entry.name for entry in target.iterdir()} == set(contents(target))


def test_unfinished_export_of_something_else_is_left_alone(checkpoint, tmp_path):
    paths = [checkpoint("qwen3_moe", overrides=BLOCKS, seed=seed) for seed in (0, 1)]
    with pytest.raises(ExportKilled):
        run_export(ExportJob(paths[0], tmp_path / "out", killed_after=1 << 20))
    for job in (
        ExportJob(paths[1], tmp_path / "out"),
        ExportJob(paths[0], tmp_path / "out", "channel"),
        ExportJob(paths[0], tmp_path / "out", server_args={"dtype": "float16"}),
    ):
        with pytest.raises(ExportError, match="unfinished export of something else"):
            run_export(job)


def test_finished_export_is_not_overwritten(checkpoint, tmp_path):
    path = checkpoint("qwen3", overrides=BLOCKS)
    run_export(ExportJob(path, tmp_path / "out"))
    before = contents(tmp_path / "out")
    with pytest.raises(ExportError, match="overwrites nothing"):
        run_export(ExportJob(path, tmp_path / "out"))
    assert contents(tmp_path / "out") == before


def test_folder_with_other_contents_is_refused(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    with pytest.raises(ExportError, match="not empty"):
        run_export(ExportJob(checkpoint("qwen3", overrides=BLOCKS), tmp_path / "out"))


def test_disk_that_is_too_small_is_noticed_before_anything_is_written(checkpoint, tmp_path):
    path = checkpoint("qwen3", overrides=BLOCKS)
    with pytest.raises(ExportError, match=r"needs .*MB of free disk, and there are 1.00 MB"):
        run_export(ExportJob(path, tmp_path / "out", free=10**6))
    assert not (tmp_path / "out").exists()


def test_memory_does_not_grow_with_tensors(checkpoint, tmp_path):
    sizes = (("hidden_size", 1024), ("intermediate_size", 65536), ("num_hidden_layers", 1))
    path = checkpoint("qwen3", overrides=sizes)
    result = run_export(ExportJob(path, tmp_path / "out", shard_bytes=1 << 30))
    largest = 1024 * 65536 * torch.bfloat16.itemsize
    assert result.exported.source_bytes > 3 * largest
    assert result.peak_bytes < largest / 2
    shutil.rmtree(path)


def test_quantized_checkpoint_is_refused(checkpoint, tmp_path):
    with pytest.raises(ExportError, match="quantized already, by fp8"):
        run_export(ExportJob(checkpoint("qwen3", stored="fp8"), tmp_path / "out"))


def test_part_that_cuts_a_block_is_refused(checkpoint, tmp_path):
    path = checkpoint("deepseek_v3", overrides=(*BLOCKS, ("q_lora_rank", 96)))
    said = r"kv_a_proj_with_mqa.weight .* from row 96 to 256, which cuts a block of 128 rows.*\"ignore\""
    with pytest.raises(ExportError, match=said):
        run_export(ExportJob(path, tmp_path / "out"))


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("stock", "no checkpoint of the scheme 'stock'.*Use one of: channel, block"),
        ('{"moe": "int8", "linear": "none"}', "no checkpoint of the scheme 'int8'"),
        ('{"linear": "channel", "moe": "block"}', "one quantization method, and block, channel were asked for"),
    ],
)
def test_scheme_without_a_stored_form_is_refused(scheme, said, checkpoint, tmp_path):
    with pytest.raises(ExportError, match=said):
        run_export(ExportJob(checkpoint("qwen3", overrides=BLOCKS), tmp_path / "out", scheme))


def test_unknown_scheme_is_refused(checkpoint, tmp_path):
    with pytest.raises(SchemeError, match="no quantization scheme 'blocks'"):
        run_export(ExportJob(checkpoint("qwen3", overrides=BLOCKS), tmp_path / "out", "blocks"))
