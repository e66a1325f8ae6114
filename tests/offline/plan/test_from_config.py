# SPDX-License-Identifier: Apache-2.0
"""The configurations of published models describe the models that were published."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from workbench.bench.plans import CONFIGS

from sglang_overlay.offline.plan.from_config import from_config

BILLIONS = {
    "Qwen1.5-MoE-A2.7B": 14.3,
    "Qwen3-30B-A3B": 30.5,
    "Qwen3-235B-A22B": 235.1,
    "DeepSeek-V2-Lite": 15.7,
    "DeepSeek-V2": 235.7,
    "DeepSeek-V3": 671.0,
    "DeepSeek-V3.2": 671.9,
    "Kimi-K2": 1026.4,
    "GLM-5": 743.9,
    "MiniMax-M2": 228.7,
    "Qwen3-Next-80B-A3B": 79.7,
    "Qwen3.5-397B-A17B": 396.8,
    "Qwen3-VL-235B-A22B": 235.7,
    "Llama-4-Maverick": 401.6,
    "Gemma-4-26B-A4B": 25.8,
    "GPT-OSS-120B": 116.8,
    "Mixtral-8x22B": 140.6,
    "Nemotron-H-56B": 56.3,
}
"""Parameters as they are published, without layers for multi-token prediction; configs/README.md says where."""

NAMES = {
    "Kimi-K2": ("model.layers.1.mlp.experts.383.gate_proj.weight", (2048, 7168)),
    "Llama-4-Maverick": ("language_model.model.layers.1.feed_forward.experts.gate_up_proj", (128, 5120, 16384)),
    "MiniMax-M2": ("model.layers.1.block_sparse_moe.experts.255.w1.weight", (1536, 3072)),
    "Nemotron-H-56B": ("backbone.layers.0.mixer.in_proj.weight", (37120, 8192)),
    "Qwen3-Next-80B-A3B": ("model.layers.1.mlp.experts.511.gate_proj.weight", (512, 2048)),
    "Qwen3-VL-235B-A22B": ("model.language_model.layers.1.mlp.experts.gate_up_proj", (128, 4096, 3072)),
    "Qwen3.5-397B-A17B": ("model.language_model.layers.1.mlp.experts.gate_up_proj", (512, 2048, 4096)),
}
"""A tensor of each checkpoint that is named or laid out in its own way."""


@pytest.fixture
def folder(request, tmp_path):
    (tmp_path / "config.json").write_text((CONFIGS / f"{request.param}.json").read_text())
    return tmp_path


@pytest.mark.parametrize(("folder", "billions"), BILLIONS.items(), indirect=["folder"], ids=list(BILLIONS))
def test_parameters_are_as_many_as_published(folder, billions):
    assert round(from_config(folder).parameters / 1e9, 1) == billions


@pytest.mark.parametrize(
    ("folder", "name", "shape"), [(of, *one) for of, one in NAMES.items()], indirect=["folder"], ids=list(NAMES)
)
def test_tensors_are_named_and_laid_out_as_in_the_published_checkpoint(folder, name, shape):
    shorten(folder / "config.json")
    assert [tensor.shape for tensor in from_config(folder).tensors if tensor.name == name] == [shape]


def shorten(path):
    """Leave two layers of each stack, which are built sooner."""
    config = json.loads(path.read_text())
    for part in (config, config.get("text_config", {})):
        lists = {key: value[:2] for key, value in part.items() if key in ("layer_types", "hybrid_override_pattern")}
        part.update(lists, **({"num_hidden_layers": 2} if "num_hidden_layers" in part else {}))
    path.write_text(json.dumps(config))


def test_every_config_is_checked():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(BILLIONS)


@pytest.mark.parametrize("folder", ["DeepSeek-V2-Lite"], indirect=True)
def test_files_are_in_model_order_and_no_larger_than_five_gigabytes(folder):
    files = from_config(folder).files
    sizes = [sum(tensor.size for tensor in file.tensors) for file in files]
    assert max(sizes) <= 5e9
    assert len(files) == 7
    layers = [
        [int(tensor.name.split(".")[2]) for tensor in file.tensors if ".layers." in tensor.name] for file in files
    ]
    assert all(max(before) <= min(after) for before, after in pairwise(layers))
