# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from sglang_overlay.upstream.checkpoint_files import file_problems, values_not_finite

FILE = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    for number in (1, 2):
        save_file({f"weight{number}": torch.ones(4)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    mapping = {"weight1": FILE, "weight2": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    return tmp_path


def test_sound_checkpoint_has_no_problems(folder):
    assert file_problems(folder) == []


def test_bin_files_and_their_index_beside_safetensors_are_not_looked_at(folder):
    (folder / "training_args.bin").touch()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"weight1": "absent.bin"}}))
    assert file_problems(folder) == []


def test_path_that_is_no_folder_has_no_problems(tmp_path):
    assert file_problems(tmp_path / "organization" / "model") == []


def test_missing_file_is_named(folder):
    (folder / FILE).unlink()
    assert file_problems(folder) == [f"model.safetensors.index.json names {FILE}, which is not there"]


def test_values_that_are_not_finite_are_counted_in_the_tensors_asked_for(folder):
    spoiled = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    save_file({"weight2": spoiled, "unasked": spoiled.clone()}, folder / "model-00002-of-00002.safetensors")
    assert values_not_finite(folder, ["weight1", "weight2", "absent"]) == {"weight1": (0, 4), "weight2": (3, 4)}


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda content: b"", "is empty or cut off: it has 0 bytes"),
        (lambda content: content[:20], "is cut off or no safetensors file: its header should have"),
        (lambda content: content[:-1], "is damaged, or its download is incomplete: "),
        (lambda content: content + b"x", "is damaged, or its download is incomplete: "),
        (lambda content: content.replace(b"F32", b"F23"), "is damaged, or its download is incomplete: "),
        (lambda content: b"<html><body>Not found</body></html>", "is cut off or no safetensors file"),
    ],
)
def test_damaged_file_is_named(damage, told, folder):
    (folder / FILE).write_bytes(damage((folder / FILE).read_bytes()))
    (problem,) = file_problems(folder)
    assert problem.startswith(f"{FILE} {told}")


def test_empty_bin_file_is_named_where_bin_files_are_read(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    assert file_problems(tmp_path) == ["pytorch_model.bin is empty"]


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', "{}"])
def test_broken_index_is_named(text, folder):
    (folder / "model.safetensors.index.json").write_text(text)
    (problem,) = file_problems(folder)
    assert problem.startswith("model.safetensors.index.json is no index of weights")
