# SPDX-License-Identifier: Apache-2.0
"""``--load-format presharded``: a second start reads what the first has made, and nothing that it does not want."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from harness.streamed import assert_streamed, load_reported, warnings_of
from safetensors.torch import load_file, save_file
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, LoadFailed, compare

from sglang_overlay.load.checkpoint_files import fingerprint
from sglang_overlay.load.presharded import READY, RECORD

pytestmark = pytest.mark.needs("sglang.srt.model_loader.loader.PreshardedModelLoader.load_model")

BLOCKS = (("hidden_size", 256), ("intermediate_size", 512), ("moe_intermediate_size", 256), ("head_dim", 128))
"""Sizes that divide into blocks of 128, also over two ranks."""
MLA = (*BLOCKS[:3], ("q_lora_rank", 128))
SCHEMES = ("stock", "tensor", "channel", "block", '{"moe": "int8"}')
MANY = {"files": 3, "assignment": "shuffled"}


def presharded(path, folder, scheme="stock", **fields):
    """A start that reads the dump in ``folder``, or writes it."""
    return LoadJob(
        path,
        environ={"SGLANG_STREAMFP8_SCHEME": scheme},
        loader_config={"presharded_path": str(folder)},
        server_args={"load_format": "presharded"},
        **fields,
    )


def starts_agree(workers, job, folder):
    """Start twice: the same weights, attributes and answers, and the second streams too."""
    first, second = workers.load(job), load_reported(workers.load, job, folder)
    assert differences(first, second[0]) == []
    assert_streamed(second[1], job.ranks)


def differences(first, second):
    # SGLang notes this when it loads experts by their own loaders, which a dump does without.
    return [line for line in compare(first, second) if "use_padded_loading" not in line]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_second_start_has_what_the_first_has(scheme, workers, checkpoint, tmp_path):
    path = checkpoint("qwen3_moe", overrides=BLOCKS, **MANY)
    starts_agree(workers, presharded(path, tmp_path / "dump", scheme, prompts=PROMPTS), tmp_path / "reports")


@pytest.mark.parametrize("scheme", ["stock", "block"])
def test_second_start_of_latent_attention(scheme, workers, checkpoint, tmp_path):
    path = checkpoint("deepseek_v3", overrides=MLA, **MANY)
    starts_agree(workers, presharded(path, tmp_path / "dump", scheme, prompts=PROMPTS), tmp_path / "reports")


def test_second_start_over_two_ranks(workers, checkpoint, tmp_path):
    path = checkpoint("qwen3_moe", overrides=BLOCKS, **MANY)
    starts_agree(workers, presharded(path, tmp_path / "dump", "block", tp_size=2), tmp_path / "reports")


@pytest.mark.nightly
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_second_start_of_each_family(scheme, family, tp_size, workers, checkpoint, tmp_path):
    path = checkpoint(family, overrides=MLA if family == "deepseek_v3" else BLOCKS, **MANY)
    starts_agree(workers, presharded(path, tmp_path / "dump", scheme, tp_size=tp_size), tmp_path / "reports")


def test_second_start_of_mxfp8(workers, checkpoint, tmp_path):
    job = presharded(checkpoint("qwen3_moe", overrides=BLOCKS), tmp_path / "dump", quantization="mxfp8")
    starts_agree(workers, replace(job, environ={}), tmp_path / "reports")


@pytest.fixture
def dumped(workers, checkpoint, tmp_path):
    """A start that has written a dump, the folder for dumps, and a copy of the checkpoint to be changed."""
    path = shutil.copytree(checkpoint("qwen3_moe", overrides=BLOCKS), tmp_path / "model")
    job = presharded(path, tmp_path / "dumps", "block", streaming="require")
    return job, workers.load(job), tmp_path / "dumps"


def dumps_in(folder):
    return sorted(mark.parent for mark in folder.glob(f"*/{READY}"))


def test_dump_of_another_checkpoint_is_refused(dumped, workers, checkpoint):
    job, _, folder = dumped
    other = checkpoint("qwen3_moe", overrides=BLOCKS, seed=1)
    shutil.copy(other / "model.safetensors", job.checkpoint)
    with pytest.raises(LoadFailed, match=r"was made of another checkpoint \(model\.safetensors is not the file"):
        workers.load(replace(job, streaming="1"))
    assert len(dumps_in(folder)) == 1


def test_dump_serves_where_the_checkpoints_weights_are_not(dumped, workers):
    job, first, _ = dumped
    (job.checkpoint / "model.safetensors").unlink()
    assert differences(first, workers.load(job)) == []


def test_dump_of_another_release_is_refused(dumped, workers):
    job, _, folder = dumped
    (dump,) = dumps_in(folder)
    record = json.loads((dump / RECORD).read_text())
    record["made"]["SGLang"] = "0.5.0"
    (dump / RECORD).write_text(json.dumps(record))
    with pytest.raises(LoadFailed, match=r"was made of SGLang 0\.5\.0, not "):
        workers.load(job)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param({"environ": {"SGLANG_STREAMFP8_SCHEME": "channel"}}, "scheme block, not channel", id="scheme"),
        pytest.param({"tp_size": 2}, "tp 1, not 2", id="parallelism"),
    ],
)
def test_dump_that_does_not_fit_is_named_and_not_read(change, said, dumped, workers):
    job, _, folder = dumped
    changed = replace(job, **change)
    with pytest.raises(
        LoadFailed, match=rf"require, but no dump in {folder} fits this start: TP-1-sig-\w+ was.* {said}"
    ):
        workers.load(changed)
    assert len(dumps_in(folder)) == 1
    result = workers.load(replace(changed, streaming="1"))
    (warning,) = warnings_of(result)
    assert said in warning
    assert len(dumps_in(folder)) == 2
    # Which is what the next start reads, with nothing to say.
    second = workers.load(changed)
    assert differences(result, second) == []
    assert warnings_of(second) == []


def test_load_that_fails_leaves_no_dump(workers, checkpoint, tmp_path):
    """SGLang itself would mark it as complete before anything is known of the weights that are missing."""
    path = shutil.copytree(checkpoint("qwen3_moe", overrides=BLOCKS), tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")
    job = presharded(path, tmp_path / "dump", streaming="1")
    for _ in range(2):
        with pytest.raises(LoadFailed, match=r"IncompleteLoadError(.|\n)*experts\.w13_weight"):
            workers.load(job)
    assert dumps_in(tmp_path / "dump") == []


def test_model_that_is_loaded_anew_leaves_the_dump_of_its_last_load(odd_workers, checkpoint, tmp_path):
    path = checkpoint("qwen3", overrides=(("architectures", ("ManyLateAddingLoadersForCausalLM",)),))
    job = presharded(path, tmp_path / "dump", streaming="1", prompts=PROMPTS)
    first, second = odd_workers.load(job), odd_workers.load(job)
    plain = odd_workers.load(replace(job, server_args={}, loader_config={}))
    assert compare(plain, first) == []
    assert first.tokens == second.tokens == plain.tokens


@pytest.mark.parametrize("size", [0, 100, 5000, 1 << 20])
def test_fingerprint_tells_files_apart(size, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    content = bytearray(number * 7 % 256 for number in range(size))
    one.write_bytes(content)
    other.write_bytes(content)
    assert fingerprint(one) == fingerprint(other)
    if size:
        content[-1] ^= 1
        other.write_bytes(content)
        assert fingerprint(one) != fingerprint(other)
    other.write_bytes(content + b"x")
    assert fingerprint(one) != fingerprint(other)
