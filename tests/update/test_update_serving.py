# SPDX-License-Identifier: Apache-2.0
"""Weight updates as users make them, over HTTP and through ``sglang.Engine``, with requests before and after."""

from __future__ import annotations

import json
import sys

import pytest
from harness.mutations import altered
from harness.trainer import has_sessions, run_in_a_process, until_idle
from workbench.loads import serving
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS
from workbench.loads.serving import post

from sglang_overlay.hooks.update_hooks import BEFORE_UPDATE

SEED = 1


@pytest.fixture
def tokens(workers, checkpoint):
    """What a streamed load of a family's weights generates, in a process that has held no other server's settings."""

    def generate(family, seed):
        job = LoadJob(checkpoint(family, seed=seed), streaming="require", prompts=PROMPTS)
        return [list(ids) for ids in workers.load_fresh(job).tokens]

    return generate


@pytest.fixture
def server(checkpoint, tmp_path):
    def start(family):
        port = serving.free_port()
        arguments = ("--quantization", "fp8", "--device", "cpu", "--log-level", "info")
        command = serving.sglang_command(sys.executable, str(checkpoint(family)), port, arguments)
        launch = serving.Launch(command, port, tmp_path / "server.log", {"SGLANG_STREAMFP8": "require"})
        return serving.running(launch, timeout=300)

    return start


def checksum(url):
    """Of each tensor. None where this release reads checksums on a GPU only: all that is left to compare are tokens."""
    try:
        (rank,) = post(url, "weights_checker", {"action": "checksum"}).json()["ranks"]
    except serving.ServerError as error:
        if "Found no NVIDIA driver" not in str(error):
            raise
        return None
    assert rank["checksums"]
    return rank["checksums"]


def generated(url):
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    content = {"input_ids": [list(prompt) for prompt in PROMPTS], "sampling_params": sampling}
    answers = post(url, "generate", content).json()
    until_idle(url)
    return [answer["output_ids"] for answer in answers]


def test_server_is_updated_from_disk_and_back_by_broadcast(server, checkpoint, tokens):
    old, new = checkpoint("deepseek_v3"), checkpoint("deepseek_v3", seed=SEED)
    with server("deepseek_v3") as url:
        before, weights = generated(url), checksum(url)
        post(url, "update_weights_from_disk", {"model_path": str(new)})
        updated, changed = generated(url), checksum(url)
        run_in_a_process("distributed", "--url", url, "--checkpoint", old)
        after, restored = generated(url), checksum(url)
    assert updated == tokens("deepseek_v3", SEED)
    assert before == after == tokens("deepseek_v3", 0)
    if weights is not None:
        assert restored == weights
        assert [name for name in weights if weights[name] == changed[name]] == []


def test_server_keeps_what_it_serves_when_an_update_fails(server, checkpoint, tmp_path):
    """Whatever fails: a file, values that mean nothing here, names; and wherever the weights served came from."""
    new = checkpoint("qwen3_moe", seed=SEED)
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in new.iterdir():
        content = file.read_bytes()
        (broken / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    prefixed = altered(new, tmp_path / "prefixed", _prefix)
    fp8 = checkpoint("qwen3_moe", seed=SEED, stored="fp8_block")
    with server("qwen3_moe") as url:
        run_in_a_process("distributed", "--url", url, "--checkpoint", new)
        before, weights = generated(url), checksum(url)
        for folder, told in ((broken, "SafetensorError"), (fp8, "float8_e4m3fn"), (prefixed, "_orig_mod.")):
            with pytest.raises(serving.ServerError, match=rf"(?s)400.*{told}.*{BEFORE_UPDATE}"):
                post(url, "update_weights_from_disk", {"model_path": str(folder)})
            assert generated(url) == before
            assert checksum(url) == weights
        if has_sessions():
            post(url, "begin_weight_update", {})
            assert generated(url) == before
            post(url, "end_weight_update", {})
        # A folder that the server has never heard of before: where it was started is not what it serves.
        post(url, "update_weights_from_disk", {"model_path": str(checkpoint("qwen3_moe"))})
        assert generated(url) != before


def _prefix(tensors):
    for name in list(tensors):
        tensors[f"_orig_mod.{name}"] = tensors.pop(name)


def test_engine_is_updated_by_tensors_by_buckets_and_from_disk_but_not_by_half_an_expert(checkpoint, tokens):
    old, new = checkpoint("qwen3_moe"), checkpoint("qwen3_moe", seed=SEED)
    printed = run_in_a_process("engine", "--model", old, "--checkpoint", new, "--prompts", json.dumps(PROMPTS))
    found = json.loads(printed.splitlines()[-1])
    half, *whole = found["answers"]
    assert [answer[0] for answer in half] == ([True, True, False] if has_sessions() else [True])
    assert "experts.w13_weight (1 of 8 units)" in half[-1][1]
    assert all(answer[0] for answers in whole for answer in answers), whole
    before, after = tokens("qwen3_moe", 0), tokens("qwen3_moe", SEED)
    assert before != after
    assert found["tokens"] == [before, before, after, before, after]
