# SPDX-License-Identifier: Apache-2.0
"""Watched placeholders: the same writes as every operation looked at gives, and no trace of it outside of a loader."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_overlay.core.capture import WriteCapture, storage_key
from sglang_overlay.core.captured_views import ViewCapture, capture_of
from sglang_overlay.core.errors import UnsupportedWriteError

SHAPE = (4, 6, 8)


class Notes:
    """A sink that notes where each write goes, and what it brings."""

    name = "layer.weight"

    def __init__(self):
        self.writes = []

    def write(self, destination, source):
        place = destination.storage_offset(), tuple(destination.shape), destination.stride()
        self.writes.append((place, source.clone()))

    def same_as(self, other):
        return len(self.writes) == len(other.writes) and all(
            one == two and torch.equal(a, b) for (one, a), (two, b) in zip(self.writes, other.writes, strict=True)
        )


def placeholder_of(shape=SHAPE):
    return torch.nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)


def watched():
    placeholder, notes = placeholder_of(), Notes()
    return placeholder, notes, capture_of([placeholder], {storage_key(placeholder): notes})


def plain():
    placeholder, notes = placeholder_of(), Notes()
    return placeholder, notes, lambda: WriteCapture({storage_key(placeholder): notes})


def values(shape):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


WAYS = {
    "an expert's rows": lambda p: p.data[2].narrow(0, 3, 3).copy_(values((3, 8))),
    "by an index of several": lambda p: p.data[1, 2:4].copy_(values((2, 8))),
    "by assignment": lambda p: p.data.__setitem__((0, slice(2)), values((2, 8))),
    "a number assigned": lambda p: p.data.__setitem__(3, 1.5),
    "zeroed": lambda p: p.data[1].zero_(),
    "filled": lambda p: p.data.narrow(1, 0, 2).fill_(2.0),
    "broadcast": lambda p: p.data[0].copy_(values((8,))),
    "to a function's view": lambda p: torch.narrow(p.data, 2, 1, 3)[0].copy_(values((6, 3))),
    "to one of several views": lambda p: p.data.chunk(2, dim=1)[1][3].copy_(values((3, 8))),
    "transposed": lambda p: p.data[1].t().copy_(values((8, 6))),
    "reshaped": lambda p: p.data.view(24, 8).narrow(0, 5, 1).copy_(values((1, 8))),
    "to the parameter itself": lambda p: p[2].copy_(values((6, 8))),
    "without data": lambda p: p.narrow(0, 1, 2).copy_(values((2, 6, 8))),
    "detached": lambda p: p.detach()[0].copy_(values((6, 8))),
    "by a function": lambda p: torch.Tensor.copy_(p.data[3], values((6, 8))),
    "from a parameter": lambda p: p.data[3].copy_(torch.nn.Parameter(values((6, 8)))),
    "read": lambda p: p.data[1].narrow(0, 0, 2).sum().item(),
    "changed": lambda p: p.data[1].narrow(0, 0, 2).add_(1),
    "copied out": lambda p: torch.zeros(6, 8).copy_(p.data[1]),
    "copied to itself": lambda p: p.data[1].copy_(p.data[0]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_write_is_caught_as_when_every_operation_is_looked_at(way):
    caught = []
    for make in (watched, plain):
        placeholder, notes, capture = make()
        error = None
        with capture():
            try:
                WAYS[way](placeholder)
            except UnsupportedWriteError as refused:
                error = str(refused)
        caught.append((notes, error))
    (one, refusal), (other, other_refusal) = caught
    assert one.same_as(other)
    assert refusal == other_refusal
    assert one.writes or refusal


STEPS = {
    "index": lambda view, at: view[at % view.shape[0]] if view.dim() > 1 else view,
    "narrow": lambda view, at: view.narrow(0, at % view.shape[0], 1),
    "slice": lambda view, at: view[at % view.shape[0] :],
    "transpose": lambda view, _: view.transpose(0, -1),
    "unsqueeze": lambda view, _: view.unsqueeze(0),
    "flatten": lambda view, _: view.flatten() if view.is_contiguous() else view,
}


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 5)), max_size=5))
def test_whatever_views_are_taken_on_the_way_the_write_is_the_same(steps):
    caught = []
    for make in (watched, plain):
        placeholder, notes, capture = make()
        with capture():
            view = placeholder.data
            for step, at in steps:
                view = STEPS[step](view, at)
            view.copy_(values(view.shape))
        caught.append(notes)
    assert caught[0].same_as(caught[1])
    assert len(caught[0].writes) == 1


def test_outside_of_a_loader_a_placeholder_is_as_before():
    placeholder, notes, capture = watched()
    with capture():
        view = placeholder.data[0]
    for tensor in (placeholder.data[0], placeholder[0], view):
        tensor.copy_(torch.ones(6, 8))
    assert notes.writes == []
    assert type(placeholder.data) is torch.Tensor


def test_other_threads_are_not_caught():
    placeholder, notes, capture = watched()
    with capture():
        other = threading.Thread(target=lambda: placeholder.data[0].copy_(torch.ones(6, 8)))
        other.start()
        other.join()
    assert notes.writes == []


def test_what_a_loader_asks_of_a_watched_parameter_is_answered():
    placeholder, _, capture = watched()
    placeholder.output_dim = 1
    with capture():
        assert isinstance(placeholder, torch.nn.Parameter)
        assert placeholder.output_dim == 1
        assert (placeholder.shape, placeholder.dtype, placeholder.is_meta) == (SHAPE, torch.float32, True)
        view = placeholder.data[0].narrow(0, 0, 2)
        assert isinstance(view, torch.Tensor)
        assert (view.shape, view.dim(), view.size(1), view.numel(), view.is_meta) == ((2, 8), 2, 8, 16, True)
        assert view.stride() == (8, 1)


def test_what_is_let_go_of_is_the_plain_parameter_it_was():
    placeholder, notes, capture = watched()
    placeholder.output_dim = 1
    ViewCapture.unwatch(placeholder)
    assert type(placeholder) is torch.nn.Parameter
    assert vars(placeholder) == {"output_dim": 1}
    with capture():
        placeholder.data[0].copy_(torch.ones(6, 8))
    assert notes.writes == []


def test_parameters_of_other_classes_keep_them():
    class RowParameter(torch.nn.Parameter):
        pass

    placeholder, notes = placeholder_of(), Notes()
    placeholder.__class__ = RowParameter
    with capture_of([placeholder], {storage_key(placeholder): notes})():
        assert type(placeholder) is RowParameter
        placeholder.data[0].copy_(torch.ones(6, 8))
    assert len(notes.writes) == 1
