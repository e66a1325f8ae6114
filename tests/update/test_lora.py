# SPDX-License-Identifier: Apache-2.0
"""An adapter on top of a streamed model answers as it does on top of stock's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from harness import adapters
from harness.mutations import altered
from harness.streamed import assert_streamed
from harness.trainer import has_sessions, until_idle
from workbench.loads import serving
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS
from workbench.loads.serving import post

from sglang_overlay.observe.report import read_folder

pytestmark = pytest.mark.server
HARNESS = Path(__file__).parents[1] / "harness"


@pytest.fixture
def server(tmp_path):
    """A server of a checkpoint, with an adapter for all of its layers."""

    def start(model, streaming, *arguments):
        adapter = tmp_path / f"adapter-{model.name}"
        if not adapter.exists():
            adapters.build(model, adapter)
        # SGLang's LoRA kernels need a GPU, except these.
        lora = ("--lora-paths", f"adapter={adapter}", "--lora-backend", "torch_native", "--max-loras-per-batch", "2")
        common = ("--quantization", "fp8", "--device", "cpu", "--log-level", "info")
        port = serving.free_port()
        command = serving.sglang_command(sys.executable, str(model), port, (*lora, *common, *arguments))
        environ = {
            "SGLANG_STREAMFP8": streaming,
            "SGLANG_STREAMFP8_REPORT": str(tmp_path / streaming),
            "SGLANG_EXTERNAL_MODEL_PACKAGE": "unpinned",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HARNESS), os.environ.get("PYTHONPATH")])),
        }
        ready = "/v1/models" if "--skip-server-warmup" in arguments else "/health_generate"
        return serving.running(serving.Launch(command, port, tmp_path / "server.log", environ, ready), timeout=300)

    return start


@pytest.fixture
def answers(checkpoint, server):
    """Token ids that a server of its own generates, with and without an adapter; and again after each update."""
    model = checkpoint("qwen3")

    def ask(streaming, *updates):
        with server(model, streaming) as url:
            found = [generated(url), generated(url, lora_path="adapter")]
            for folder in updates:
                until_idle(url)
                post(url, "update_weights_from_disk", {"model_path": str(folder)})
                found.append(generated(url))
            return found

    return ask


def generated(url, **fields):
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    content = {"input_ids": [list(prompt) for prompt in PROMPTS], "sampling_params": sampling, **fields}
    return [answer["output_ids"] for answer in post(url, "generate", content).json()]


def _only_o_proj(tensors):
    for name in [name for name in tensors if "o_proj" not in name]:
        del tensors[name]


@pytest.mark.timeout(900)
def test_adapter_gives_stocks_answers_and_updates_end_as_a_fresh_load(answers, checkpoint, workers, tmp_path):
    model, new = checkpoint("qwen3"), checkpoint("qwen3", seed=1)
    part = altered(model, tmp_path / "part", _only_o_proj)
    plain, adapted, same, updated = answers("require", part, new)
    assert plain != adapted
    assert [plain, adapted] == answers("0")
    assert same == plain
    assert updated == [list(ids) for ids in workers.load_fresh(LoadJob(new, prompts=PROMPTS)).tokens]
    assert_streamed(read_folder(tmp_path / "require"))


@pytest.mark.skipif(not has_sessions(), reason="checksums are read on a GPU only, and without sessions")
def test_experts_with_an_adapter_are_updated(server, checkpoint):
    """SGLang runs these with Triton kernels: there are no answers to compare, but checksums of what is served."""
    old, new = checkpoint("qwen3_moe"), checkpoint("qwen3_moe", seed=1)
    with server(old, "require", "--skip-server-warmup") as url:
        before = checksums(url)
        assert sum("experts.base_layer.w" in name for name in before) == 12
        post(url, "update_weights_from_disk", {"model_path": str(new)})
        updated = checksums(url)
        assert [name for name in before if updated[name] == before[name]] == []
        post(url, "update_weights_from_disk", {"model_path": str(old)})
        assert checksums(url) == before


def checksums(url):
    (rank,) = post(url, "weights_checker", {"action": "checksum"}).json()["ranks"]
    return rank["checksums"]
