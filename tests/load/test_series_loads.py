# SPDX-License-Identifier: Apache-2.0
"""An SGLang with the patch series loads models that do more than write to their weights as stock does."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness.mutations import altered, without_shared_keys_and_values
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, LoadFailed, compare

from sglang_overlay.hooks import built_in

pytestmark = [
    pytest.mark.patched,
    pytest.mark.skipif(not built_in.streams_itself(), reason="is about an SGLang with the patch series"),
]

IN_ONE_PART = """
import torch
from sglang.srt.layers.quantization.fp8_utils import input_to_float8

def in_one_part(x):
    limit = torch.finfo(torch.float8_e4m3fn).max
    smallest, largest = x.aminmax()
    scale = limit / torch.maximum(smallest.abs(), largest.abs()).float().clamp(min=1e-12)
    return (x.float() * scale).clamp(min=-limit, max=limit).to(torch.float8_e4m3fn), scale.float().reciprocal()

weights = [torch.randn(shape).bfloat16() for shape in ((3, 5), (2048, 1537), (7, 500, 1000))]
weights += [weights[1].t(), torch.zeros(4, 4), weights[1].index_fill(0, torch.tensor([3]), torch.nan)]
for weight in weights:
    (values, scale), (expected, expected_scale) = input_to_float8(weight), in_one_part(weight)
    assert values.is_contiguous() and values.shape == weight.shape
    assert torch.equal(values.view(torch.uint8), expected.contiguous().view(torch.uint8))
    assert torch.equal(scale, expected_scale) or scale.isnan() and expected_scale.isnan()
"""

STREAMED = [
    "CustomLoaderForCausalLM",
    "LoaderlessForCausalLM",
    "ReusedBufferForCausalLM",
    "BypassingForCausalLM",
    "LeavingTensorsWithoutMemoryForCausalLM",
]
LOADED_AGAIN = [
    "RepackingForCausalLM",
    "ReadingInInitForCausalLM",
    "AddingLoaderForCausalLM",
    "FusedAddingLoaderForCausalLM",
    "LateAddingLoaderForCausalLM",
    "MergingForCausalLM",
    "ReadingAfterLoadingForCausalLM",
    "ReplacingDataForCausalLM",
    "ReplacingParameterForCausalLM",
    "ScalingForCausalLM",
]


@pytest.fixture
def loaded(odd_workers, checkpoint):
    """What a streaming load logs; the model is that of stock."""

    def load(architecture):
        path = checkpoint("qwen3", overrides=(("architectures", (architecture,)),))
        stock = odd_workers.load(LoadJob(path, streaming="0", prompts=PROMPTS))
        result = odd_workers.load(LoadJob(path, streaming="1", prompts=PROMPTS))
        assert compare(stock, result) == []
        return [line for line in result.log if f" {built_in.PACKAGE}." in line]

    return load


@pytest.mark.parametrize("architecture", STREAMED)
def test_model_that_writes_in_its_own_way_streams(architecture, loaded):
    (line,) = loaded(architecture)
    assert line.startswith(f"INFO {built_in.PACKAGE}.loading: Quantized ")


@pytest.mark.parametrize("architecture", LOADED_AGAIN)
def test_model_that_cannot_stream_is_loaded_again_with_one_warning(architecture, loaded):
    (line,) = loaded(architecture)
    assert line.startswith(f"WARNING {built_in.PACKAGE}.loading: Loading again")


def test_keys_and_values_that_no_layer_uses_may_lack(workers, checkpoint_folder, tmp_path):
    path = without_shared_keys_and_values(checkpoint_folder, tmp_path / "gemma4")
    try:
        stock = workers.load(LoadJob(path, streaming="0", uninitialized=0.0))
    except LoadFailed as error:
        pytest.skip(f"stock cannot load Gemma 4 on a CPU in this release: {str(error).splitlines()[-1]}")
    result = workers.load(LoadJob(path, streaming="1", uninitialized=0.0))
    assert compare(stock, result) == []
    (line,) = [line for line in result.log if f" {built_in.PACKAGE}." in line]
    assert "to fp8 while loading" in line


def test_input_to_float8_gives_in_parts_what_it_gave_in_one():
    subprocess.run([sys.executable, "-c", IN_ONE_PART], check=True)


def test_missing_expert_is_named(workers, checkpoint, tmp_path):
    lost = "model.layers.1.mlp.experts.3.up_proj.weight"
    path = altered(checkpoint("qwen3_moe"), tmp_path / "damaged", lambda tensors: tensors.pop(lost))
    with pytest.raises(LoadFailed, match=r"layers\.1\.mlp\.experts\.w13_weight \(1 of \d+ experts: 3\)"):
        workers.load(LoadJob(path, streaming="1"))
