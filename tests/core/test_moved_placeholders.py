# SPDX-License-Identifier: Apache-2.0
"""A model may move a part of itself while it is built: a placeholder in it stays one, and may get another dtype."""

from __future__ import annotations

import pytest
import torch

from sglang_overlay.core.capture import storage_key
from sglang_overlay.core.moved_placeholders import MovedPlaceholders

CPU = torch.device("cpu")


@pytest.fixture
def module():
    """A layer whose weight is a placeholder of float16, and whose bias is not."""
    layer = torch.nn.Linear(8, 4, dtype=torch.float16)
    torch.nn.init.ones_(layer.bias)
    layer.weight = torch.nn.Parameter(torch.empty(4, 8, dtype=torch.float16, device="meta"), requires_grad=False)
    return layer


@pytest.fixture
def moved(module):
    watch = MovedPlaceholders()
    watch.add(module.weight, CPU)
    return watch


MOVES = {
    "to a device": lambda module: module.to(CPU),
    "to a device and a dtype": lambda module: module.to(device="cpu", dtype=torch.bfloat16),
    "to a dtype": lambda module: module.to(torch.bfloat16),
    "twice": lambda module: module.to(torch.float32).to(device="cpu", dtype=torch.bfloat16),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_placeholder_is_the_same_one_afterwards(move, module, moved):
    placeholder, first = module.weight, storage_key(module.weight)
    with moved:
        move(module)
    assert module.weight is placeholder
    assert placeholder.is_meta
    assert placeholder.shape == (4, 8)
    assert placeholder.dtype is module.bias.dtype
    assert module.bias.eq(1).all()
    assert moved.first_key(placeholder) == first


def test_move_that_changes_nothing_keeps_views(module, moved):
    view = module.weight.data[1:]
    with moved:
        module.to(CPU)
    assert storage_key(view) == storage_key(module.weight)


def test_what_is_computed_from_a_placeholder_is_none(module, moved):
    with moved:
        computed = module.weight.data + 1
    assert moved.first_key(computed) == storage_key(computed) != storage_key(module.weight)


def test_tensor_of_somebody_else_cannot_be_moved(moved):
    other = torch.empty(2, device="meta")
    with moved, pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        other.to(CPU)
    with moved:
        assert other.to(torch.float16).dtype is torch.float16
        assert torch.ones(2).to("meta").is_meta


def test_placeholder_cannot_be_moved_elsewhere(module):
    moved = MovedPlaceholders()
    moved.add(module.weight, torch.device("meta"))
    with moved, pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        module.to(CPU)


def test_nothing_is_different_afterwards(module, moved):
    with moved:
        pass
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        module.to(CPU)
