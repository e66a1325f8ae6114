# SPDX-License-Identifier: Apache-2.0
"""An adapter on top of a streamed model answers as it does on top of stock's."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from workbench import adapters, serving
from workbench.loads import PROMPTS, LoadJob
from workbench.mutations import altered
from workbench.serving import post
from workbench.trainer import until_idle

from sglang_overlay.observe.report import read_folder
from upstream.streamed import assert_streamed

pytestmark = pytest.mark.server
HERE = Path(__file__).parent


@pytest.fixture
def answers(checkpoint, tmp_path):
    """Token ids that a server of its own generates, with and without an adapter; and again after each update."""
    model = checkpoint("qwen3")
    adapter = adapters.build(model, tmp_path / "adapter")
    # SGLang's LoRA kernels need a GPU, except these.
    arguments = ("--lora-paths", f"adapter={adapter}", "--lora-backend", "torch_native", "--max-loras-per-batch", "2")
    arguments += ("--quantization", "fp8", "--device", "cpu", "--log-level", "info")

    def ask(streaming, *updates):
        port = serving.free_port()
        command = serving.sglang_command(sys.executable, str(model), port, arguments)
        environ = {
            "SGLANG_STREAMFP8": streaming,
            "SGLANG_STREAMFP8_REPORT": str(tmp_path / streaming),
            "SGLANG_EXTERNAL_MODEL_PACKAGE": "unpinned",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
        }
        with serving.running(serving.Launch(command, port, tmp_path / "server.log", environ), timeout=300) as url:
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
