# SPDX-License-Identifier: Apache-2.0
"""Checkpoint memory is told from other memory, and mapped files from copies."""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file

from sglang_overlay.core.sources import CheckpointSources, is_file_mapped


def test_sources_know_views_and_forget_nothing_that_lives():
    sources = CheckpointSources()
    tensor = torch.randn(4, 8)
    sources.offer(tensor)
    assert sources.holds(tensor[1:3].t())
    assert not sources.holds(tensor.clone())
    for _ in range(50):
        sources.offer(torch.randn(16))
    assert sources.holds(tensor)
    assert not any(sources.holds(torch.randn(16)) for _ in range(50))
    assert len(sources._sources) <= 3


def test_mapped_checkpoint_is_told_from_a_copy_of_it(tmp_path):
    save_file({"weight": torch.randn(64, 64), "other": torch.randn(8)}, tmp_path / "model.safetensors")
    mapped = load_file(tmp_path / "model.safetensors")["weight"]
    assert is_file_mapped(mapped)
    assert is_file_mapped(mapped[3:5].t())
    assert not is_file_mapped(mapped.clone())
    sources = CheckpointSources()
    sources.offer(mapped)
    assert sources.is_mapped(mapped[1])
    assert not sources.is_mapped(mapped.clone())


def test_anonymous_and_empty_memory_is_not_mapped():
    assert not is_file_mapped(torch.zeros(1 << 20))
    assert not is_file_mapped(torch.zeros(0))
    assert not is_file_mapped(torch.empty(4, device="meta"))
