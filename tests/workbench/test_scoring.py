# SPDX-License-Identifier: Apache-2.0
"""Logprobs that are taken from a ModelRunner are those that a server returns."""

from __future__ import annotations

import random
import sys

import pytest
from workbench import serving
from workbench.loads import LoadJob

VOCABULARY = range(3, 512)
ROUNDING = 0.01
"""Of bf16 logits around 1, twice: matrices are multiplied in other batches."""


@pytest.mark.server
@pytest.mark.parametrize("quantization", ["fp8", "mxfp8"])
def test_server_returns_the_same_logprobs(quantization, workers, checkpoint, tmp_path):
    chance = random.Random(0)
    windows = tuple(tuple(chance.choices(VOCABULARY, k=48)) for _ in range(3))
    path, port = checkpoint("qwen3_moe"), serving.free_port()
    found = workers.load(LoadJob(path, quantization=quantization, scored=windows)).ranks[0].logprobs
    arguments = ("--quantization", quantization, "--device", "cpu")
    command = serving.sglang_command(sys.executable, str(path), port, arguments)
    with serving.running(serving.Launch(command, port, tmp_path / "server.log"), timeout=300) as url:
        served = serving.input_logprobs(url, windows)
    assert [len(window) for window in served] == [47] * 3
    for one, other in zip(found, served, strict=True):
        assert one == pytest.approx(other, abs=ROUNDING)
