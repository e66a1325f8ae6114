# SPDX-License-Identifier: Apache-2.0
"""Checkpoint memory is told from other memory, and mapped files from copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sglang_overlay.core import mapped_files
from sglang_overlay.core.mapped_files import mapping_at
from sglang_overlay.core.sources import CheckpointSources, Watch


def is_mapped(tensor):
    sources = CheckpointSources()
    sources.offer(tensor)
    return sources.is_mapped(tensor)


def test_sources_know_views_and_forget_nothing_that_lives():
    sources = CheckpointSources()
    tensor = torch.randn(4, 8)
    sources.offer(tensor)
    assert sources.holds(tensor[1:3].t())
    assert not sources.holds(tensor.clone())
    for _ in range(1000):
        sources.offer(torch.randn(16))
    assert sources.holds(tensor)
    assert not any(sources.holds(torch.randn(16)) for _ in range(50))
    assert len(sources._sources) < 600


def test_mapped_checkpoint_is_told_from_a_copy_of_it(tmp_path):
    save_file({"weight": torch.randn(64, 64), "other": torch.randn(8)}, tmp_path / "model.safetensors")
    mapped = load_file(tmp_path / "model.safetensors")["weight"]
    assert is_mapped(mapped)
    assert is_mapped(mapped[3:5].t())
    assert not is_mapped(mapped.clone())
    sources = CheckpointSources()
    sources.offer(mapped)
    assert sources.is_mapped(mapped[1])
    assert not sources.is_mapped(mapped.clone())


def test_anonymous_and_empty_memory_is_not_mapped():
    assert not is_mapped(torch.zeros(1 << 20))
    assert not is_mapped(torch.zeros(0))
    assert not is_mapped(torch.empty(4, device="meta"))


@pytest.fixture
def lookups(monkeypatch):
    """Addresses for which the process's mappings were read."""
    asked = []
    monkeypatch.setattr(mapped_files, "mapping_at", lambda address: asked.append(address) or mapping_at(address))
    return asked


def test_mappings_are_read_once_a_file(tmp_path, lookups):
    for file in ("a", "b"):
        save_file({str(n): torch.randn(256) for n in range(50)}, tmp_path / file)
    sources = CheckpointSources()
    for file in ("a", "b"):
        for tensor in load_file(tmp_path / file).values():
            sources.offer(tensor)
            assert sources.is_mapped(tensor)
    assert len(lookups) == 2


def test_mappings_are_read_once_a_file_also_where_files_are_read_by_turns(tmp_path, lookups):
    files = ("a", "b", "c")
    for file in files:
        save_file({str(n): torch.randn(256) for n in range(50)}, tmp_path / file)
    contents = [load_file(tmp_path / file) for file in files]
    sources, copied = CheckpointSources(), torch.randn(256)
    sources.offer(copied)
    for number in range(50):
        for content in contents:
            sources.offer(content[str(number)])
            assert sources.is_mapped(content[str(number)])
        assert not sources.is_mapped(copied)
    assert len(lookups) <= 2 * len(files)


def test_mapping_at_an_address_is_what_the_kernel_says(tmp_path):
    save_file({"weight": torch.randn(256)}, tmp_path / "model.safetensors")
    tensor = load_file(tmp_path / "model.safetensors")["weight"]
    spans = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    start, stop, path = next(
        (*(int(bound, 16) for bound in span[0].split("-")), span[5])
        for span in spans
        if "model.safetensors" in span[-1]
    )
    assert path == str(tmp_path / "model.safetensors")
    assert mapping_at(tensor.data_ptr()) == mapping_at(start) == mapping_at(stop - 1) == (start, stop, True)
    assert mapping_at(0) is None


def test_nothing_is_mapped_where_nothing_tells(monkeypatch, tmp_path):
    monkeypatch.setattr(mapped_files, "_MAPS", tmp_path / "missing")
    assert mapping_at(torch.zeros(8).data_ptr()) is None


def test_mapping_that_may_be_gone_is_looked_up_again(tmp_path, lookups):
    save_file({"weight": torch.randn(256), "other": torch.randn(256)}, tmp_path / "model.safetensors")
    sources = CheckpointSources()
    for name in ("weight", "other"):
        tensor = load_file(tmp_path / "model.safetensors")[name]
        sources.offer(tensor)
        assert sources.is_mapped(tensor)
        del tensor
    assert len(lookups) == 2


def test_watch_sees_changes_through_any_view():
    tensor = torch.randn(4, 8)
    row = tensor[1]
    watch = Watch(tensor[2:])
    assert not watch.has_changed
    row.zero_()
    assert watch.has_changed


def test_watch_takes_tensors_of_inference_mode():
    with torch.inference_mode():
        assert not Watch(torch.randn(4)).has_changed


def test_mappings_are_read_once_for_memory_of_no_file(lookups):
    sources, block = CheckpointSources(), torch.zeros(1 << 25)
    for part in block.split(1 << 20):
        tensor = torch.empty(0).set_(part.untyped_storage(), part.storage_offset(), part.shape)
        sources.offer(tensor)
        assert not sources.is_mapped(tensor)
    assert len(lookups) == 1
