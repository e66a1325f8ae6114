# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from sglang_overlay.core.sources import CheckpointSources, oddity

ODD = {
    "None": (lambda: None, "None"),
    "a number": (lambda: 1.5, "of type float"),
    "text": (lambda: "pt", "of type str"),
    "a dict": (lambda: {"a": 1}, "a dict of 1 entries"),
    "sparse": (lambda: torch.eye(2).to_sparse(), "a tensor of layout sparse_coo"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)]), "a tensor of layout nested"),
    "meta": (lambda: torch.empty(2, device="meta"), "a tensor without data"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_tensor_in_memory_is_passed_over(kind):
    make, told = ODD[kind]
    value, sources = make(), CheckpointSources()
    sources.offer(value, "odd")
    assert oddity(value) == told
    if isinstance(value, torch.Tensor):
        assert sources.name_of(value) == ""
        assert not sources.holds(value)
        assert not sources.is_mapped(value)


def parts_of(whole):
    """Names and views of one storage: rows, columns, every other column, and a transposed part."""
    return {
        "rows": whole[:4],
        "left": whole[4:8, :4],
        "even": whole[4:8, 4::2],
        "odd": whole[4:8, 5::2],
        "turned": whole[8:].t(),
    }


def test_views_of_one_storage_keep_their_own_names():
    parts, sources = parts_of(torch.arange(96.0).view(12, 8)), CheckpointSources()
    for name, part in parts.items():
        sources.offer(part, name)
    for name, part in parts.items():
        views = [part, *part, *part.t(), part[1:, 1:], part.view(torch.int32)]
        assert {sources.name_of(view) for view in views} == {name}


def test_memory_that_was_never_offered_has_no_name():
    sources = CheckpointSources()
    sources.offer(torch.ones(2), "offered")
    assert sources.name_of(torch.ones(2)) == ""
