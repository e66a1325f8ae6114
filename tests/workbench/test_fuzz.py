# SPDX-License-Identifier: Apache-2.0
"""Where two tensors of one name race in stock itself, a load that holds either is right, and one of neither is not."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from harness.fuzz import SPECS, is_stock_in_another_order
from harness.load_series import LoadSeries, series_process
from harness.mutations import each_rival_alone
from safetensors.torch import load_file, save_file

DOWN = "model.layers.1.mlp.experts.2.down_proj.weight"


@pytest.fixture
def twice(checkpoint, tmp_path):
    """A checkpoint with one tensor in two files, with other values."""
    folder = tmp_path / "twice"
    shutil.copytree(checkpoint(**SPECS["deepseek_v3"]), folder)
    files = sorted(folder.glob("*.safetensors"))
    (owner,) = (file for file in files if DOWN in load_file(file))
    other = next(file for file in files if file != owner)
    _change(other, **{DOWN: load_file(owner)[DOWN] * 3})
    return folder


def test_each_file_keeps_its_own_once(twice, tmp_path):
    copies = list(each_rival_alone(twice, tmp_path / "copies"))
    held = [[load_file(file).get(DOWN) for file in sorted(copy.glob("*.safetensors"))] for copy in copies]
    kept = [[tensor for tensor in tensors if tensor is not None] for tensors in held]
    assert [len(tensors) for tensors in kept] == [1, 1]
    first, second = sorted((tensors[0] for tensors in kept), key=lambda tensor: tensor.abs().sum())
    assert torch.equal(first * 3, second)


def test_undamaged_checkpoint_has_no_rivals(checkpoint, tmp_path):
    assert list(each_rival_alone(checkpoint(**SPECS["deepseek_v3"]), tmp_path / "copies")) == []


def test_either_tensor_is_stock_in_another_order_and_a_third_is_not(twice, tmp_path):
    loaded = tmp_path / "loaded.json"
    with series_process(_judge, tmp_path / "log.txt", twice, tmp_path, loaded) as process:
        process.join(300)
    assert json.loads(loaded.read_text()) == [True, True, False]


def _judge(twice, folder, loaded):
    series = LoadSeries(twice)
    candidates = list(each_rival_alone(twice, folder / "candidates"))
    third = folder / "third"
    shutil.copytree(candidates[0], third)
    (owner,) = (file for file in third.glob("*.safetensors") if DOWN in load_file(file))
    _change(owner, **{DOWN: load_file(owner)[DOWN] * 5})
    verdicts = [
        is_stock_in_another_order(series.attempt(candidate, "1"), series, twice, folder / f"copies-{number}")
        for number, candidate in enumerate([*candidates, third])
    ]
    loaded.write_text(json.dumps(verdicts))


def _change(file, **tensors):
    save_file({**load_file(file), **tensors}, file, {"format": "pt"})
