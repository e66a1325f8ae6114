# SPDX-License-Identifier: Apache-2.0
"""Regions: the box of a view is checked against the elements the view really has."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_overlay.core.regions import Placement, difference, extent, slices, volume
from sglang_overlay.errors import UnsupportedWriteError

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@st.composite
def boxes(draw, shape):
    box = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        box.append((start, draw(st.integers(start + 1, size))))
    return tuple(box)


@st.composite
def views(draw):
    """A tensor that counts its elements, and a view of it made as weight loaders make theirs."""
    shape = draw(shapes)
    tensor = torch.arange(prod(shape)).reshape(shape)
    view = tensor
    for _ in range(draw(st.integers(0, 5))):
        view = draw(_steps(view))
    return tensor, view


def _steps(view):
    steps = [st.just(view)]
    if view.dim():
        axis = st.integers(0, view.dim() - 1)
        steps.append(axis.flatmap(lambda a: st.integers(0, view.shape[a] - 1).map(lambda i: view.select(a, i))))
        steps.append(boxes(tuple(view.shape)).map(lambda box: view[slices(box)]))
        steps.append(st.permutations(range(view.dim())).map(lambda order: view.permute(tuple(order))))
        steps.append(axis.map(lambda a: view.unsqueeze(a)))
        if view.is_contiguous():
            steps.append(st.just(view.reshape(-1)))
    return st.one_of(steps)


@settings(max_examples=400, deadline=None)
@given(views())
def test_box_of_a_view_holds_exactly_its_elements_in_order(pair):
    tensor, view = pair
    try:
        placement = Placement(view, tensor.shape)
    except UnsupportedWriteError:
        # Only a flattened view that was cut may be no box.
        assert set(view.stride()) & {1}
        return
    assert torch.equal(placement.lay_out(view), tensor[slices(placement.box)])


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda tensor: tensor.as_strided((3,), (7,)), id="diagonal"),
        pytest.param(lambda tensor: tensor[:, ::2], id="every other column"),
        pytest.param(lambda tensor: tensor.view(-1)[2:9], id="a run across rows"),
        pytest.param(lambda tensor: tensor[0].expand(4, 6), id="one row four times"),
    ],
)
def test_view_that_is_no_box_is_refused(view):
    tensor = torch.arange(24).reshape(4, 6)
    with pytest.raises(UnsupportedWriteError, match=r"\(4, 6\)"):
        Placement(view(tensor), tensor.shape)


def test_flattened_experts_are_a_box():
    tensor = torch.arange(2 * 4 * 6).reshape(2, 4, 6)
    assert Placement(tensor.view(8, 6)[4:8], tensor.shape).box == ((1, 2), (0, 4), (0, 6))


@settings(max_examples=200, deadline=None)
@given(st.data(), shapes)
def test_difference_is_disjoint_and_exact(data, shape):
    box, hole = data.draw(boxes(shape)), data.draw(boxes(shape))
    count = torch.zeros(shape, dtype=torch.int64)
    for part in difference(box, hole):
        count[slices(part)] += 1
        assert volume(part) == prod(extent(part)) > 0
    expected = torch.zeros(shape, dtype=torch.int64)
    expected[slices(box)] = 1
    expected[slices(hole)] = 0
    assert torch.equal(count, expected)
