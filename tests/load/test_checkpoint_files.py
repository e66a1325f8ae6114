# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from sglang_overlay.load.checkpoint_files import CheckpointFiles, file_problems, values_not_finite

FILE = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    for number in (1, 2):
        save_file({f"weight{number}": torch.ones(4)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    mapping = {"weight1": FILE, "weight2": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))
    return tmp_path


def files_in(folder, suffix="safetensors"):
    return list(folder.glob(f"*.{suffix}"))


def test_sound_checkpoint_has_no_problems(folder):
    assert file_problems(files_in(folder)) == []


def test_path_that_is_no_folder_has_no_problems(tmp_path):
    assert file_problems(CheckpointFiles().in_folder("organization/model")) == []


def test_missing_file_is_named(folder):
    (folder / FILE).unlink()
    index = folder / "model.safetensors.index.json"
    assert file_problems(files_in(folder)) == [f"{index} names {FILE}, which is not there"]


def test_index_of_another_set_of_weights_does_not_matter(folder):
    (folder / "other.safetensors.index.json").write_text('{"weight_map": {"a": "other.safetensors"}}')
    assert file_problems(files_in(folder)) == []


def test_values_that_are_not_finite_are_counted_in_the_tensors_asked_for(folder):
    spoiled = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    save_file({"weight2": spoiled, "unasked": spoiled.clone()}, folder / "model-00002-of-00002.safetensors")
    found = values_not_finite(files_in(folder), ["weight1", "weight2", "absent"])
    assert found == {
        "weight1": (0, 4),
        "weight2": (3, 4),
    }


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
    (problem,) = file_problems(files_in(folder))
    assert problem.startswith(f"{folder / FILE} {told}")


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "pickle of old"])
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda content: content, None),
        (lambda content: b"", "is empty"),
        (lambda content: content[:-10], "is cut off"),
        (lambda content: b"<html><body>Not found</body></html>", "cannot be read: "),
    ],
)
def test_pickled_file_that_cannot_be_read_is_named(damage, told, is_zip, folder):
    file = folder / "pytorch_model.bin"
    torch.save({"weight": torch.ones(64)}, file, _use_new_zipfile_serialization=is_zip)
    file.write_bytes(damage(file.read_bytes()))
    problems = file_problems([file])
    assert len(problems) == (told is not None)
    assert not told or problems[0].startswith(f"{file} {told if is_zip or told != 'is cut off' else 'cannot be read'}")


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": []}', "{}"])
def test_broken_index_is_named(text, folder):
    (folder / "model.safetensors.index.json").write_text(text)
    (problem,) = file_problems(files_in(folder))
    assert problem.startswith(f"{folder}/model.safetensors.index.json is no index of weights")
