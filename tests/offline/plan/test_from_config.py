# SPDX-License-Identifier: Apache-2.0
"""The configurations of published models describe the models that were published."""

from __future__ import annotations

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
}
"""Parameters as their model cards count them, DeepSeek-V3's without its multi-token prediction layer."""


@pytest.fixture
def folder(request, tmp_path):
    (tmp_path / "config.json").write_text((CONFIGS / f"{request.param}.json").read_text())
    return tmp_path


@pytest.mark.parametrize(("folder", "billions"), BILLIONS.items(), indirect=["folder"], ids=list(BILLIONS))
def test_parameters_are_as_many_as_published(folder, billions):
    assert round(from_config(folder).parameters / 1e9, 1) == billions


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
