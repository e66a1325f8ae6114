# SPDX-License-Identifier: Apache-2.0
"""Headers are read, and files follow one another as SGLang has them follow."""

from __future__ import annotations

import pytest
import torch

from sglang_overlay.offline.plan.checkpoint import Checkpoint, CheckpointError, TensorHeader, WeightFile, read_headers


def test_headers_give_names_shapes_and_sizes(checkpoint):
    path = checkpoint("qwen3_moe", files=3)
    found = read_headers(path)
    assert len(found.files) == 3
    sizes = {tensor.name: tensor.size for tensor in found.tensors}
    assert sizes["model.embed_tokens.weight"] == 512 * 256 * 2
    on_disk = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert 0 < on_disk - found.size < 200_000
    for file in found.files:
        assert [tensor.name for tensor in file.tensors] == sorted(tensor.name for tensor in file.tensors)


def test_a_folder_without_headers_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        read_headers(tmp_path)


def test_a_damaged_header_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0hello")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_headers(tmp_path)


FILES = tuple(WeightFile(f"{number}", (TensorHeader(f"t{number}", (2,), torch.bfloat16),)) for number in range(8))


def order(kind, rank=0, size=1):
    return "".join(file.name for file in Checkpoint(FILES, "a test").read_by(kind, rank, size))


def test_staggered_ranks_start_with_different_files_of_each_group():
    assert order("sorted", 1, 4) == "01234567"
    assert [order("staggered", rank, 4) for rank in (0, 1, 3)] == ["01234567", "12305674", "30127456"]


def test_shuffled_is_the_same_every_time_and_not_sorted():
    assert order("shuffled") == order("shuffled")
    assert order("shuffled") != order("sorted")
    assert sorted(order("shuffled")) == list("01234567")
