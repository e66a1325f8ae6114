# SPDX-License-Identifier: Apache-2.0
"""``--load-format dummy``, as NeMo-RL and verl start: the first full update makes it what a load would."""

from __future__ import annotations

import pytest
import torch
from harness.streamed import assert_streamed, load_reported
from workbench.loads.fingerprints import hash_of
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, compare
from workbench.loads.updates import Update

from sglang_overlay.settings import SCHEME_VARIABLE

INT8 = '{"linear": "channel", "moe": "int8"}'
BLOCKS = '{"linear": "channel", "moe": "block"}'
DUMMY = {"load_format": "dummy"}


@pytest.fixture
def load(workers, checkpoint, tmp_path_factory):
    """A load by a scheme in which everything has to be streamed; the result."""

    def run(family, scheme, *updates, **fields):
        quantization = "mxfp8" if scheme == "mxfp8" else "fp8"
        environ = {} if scheme in ("mxfp8", "stock") else {SCHEME_VARIABLE: scheme}
        path = checkpoint(family)
        job = LoadJob(path, streaming="require", quantization=quantization, environ=environ, updates=updates, **fields)
        result, reports = load_reported(workers.load, job, tmp_path_factory.mktemp("reports"))
        assert_streamed(reports, job.ranks)
        return result

    return run


def assert_filled(started, loaded):
    for rank in started.ranks:
        assert [answer.success for answer in rank.updates] == [True], rank.updates[0].message
        assert rank.updates[0].moved == ()
        assert "keeps its values" not in rank.updates[0].message
    assert compare(loaded, started) == []


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        *(("qwen3_moe", scheme) for scheme in ("stock", "channel", "block")),
        pytest.param("qwen3_moe", INT8, id="qwen3_moe-int8"),
        *(("deepseek_v3", scheme) for scheme in ("stock", "tensor", "block", "mxfp8")),
    ],
)
def test_first_full_update_ends_as_a_load(family, scheme, load, checkpoint):
    update = Update("tensor", checkpoint(family))
    started = load(family, scheme, update, server_args=DUMMY, prompts=PROMPTS)
    assert_filled(started, load(family, scheme, prompts=PROMPTS))


@pytest.mark.parametrize(("scheme", "ep_size"), [("channel", 1), (BLOCKS, 2)], ids=["columns", "experts"])
def test_first_full_update_of_two_ranks_ends_as_a_load(scheme, ep_size, load, checkpoint):
    """Dummy weights are nobody's rows: that scales are of a rank's columns is no reason to refuse them."""
    ranks = {"tp_size": 2, "ep_size": ep_size}
    started = load("deepseek_v3", scheme, Update("disk", checkpoint("deepseek_v3")), server_args=DUMMY, **ranks)
    assert_filled(started, load("deepseek_v3", scheme, **ranks))


def test_scales_are_those_of_the_dummy_weights(load):
    """They are none of the parameters that are filled with ones or random values."""
    result = load("qwen3", "block", server_args=DUMMY, prompts=PROMPTS)
    assert result.ranks[0].logits_finite
    scales = [result.ranks[0].tensors[f"model.layers.{layer}.mlp.down_proj.weight_scale_inv"] for layer in range(3)]
    assert {scale.shape for scale in scales} == {(2, 3)}
    # Each weight's values begin with the same seed.
    assert len({scale.sha256 for scale in scales}) == 1
    assert scales[0].sha256 != hash_of(torch.ones(2, 3))


@pytest.mark.memory
@pytest.mark.nightly
def test_peak_is_little_above_the_model(workers, checkpoint):
    path = checkpoint("qwen3_moe", size="bench_2g", files=4)
    environ = {SCHEME_VARIABLE: "block"}
    job = LoadJob(path, streaming="require", environ=environ, server_args=DUMMY, described="sizes")
    (rank,) = workers.load_fresh(job).ranks
    # One weight at a time is made up in bf16: the experts' w13 of a layer.
    largest = 64 * 2 * 768 * 2048 * 2
    assert rank.memory.peak_above_start <= 1.02 * rank.model_bytes + largest
