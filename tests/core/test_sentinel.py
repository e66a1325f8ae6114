# SPDX-License-Identifier: Apache-2.0
"""Sentinels tell what nobody wrote, and leave no trace."""

from __future__ import annotations

import pytest
import torch

from sglang_overlay.core.sentinel import Sentinels, clear, fill

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture
def weight():
    return torch.nn.Parameter(torch.arange(100.0).reshape(4, 25))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (300, 3)])
def test_what_nobody_wrote_is_named_and_as_it_was(shape, dtype):
    before = torch.randn(shape).to(dtype)
    weight = before.clone()
    marks = Sentinels({"norm.weight": weight})
    assert not torch.equal(weight, before)
    assert marks.lift({"norm.weight": weight}) == ["norm.weight"]
    assert torch.equal(weight, before)


@pytest.mark.parametrize("write", [lambda p: p.data.copy_(torch.ones(4, 25)), lambda p: p.data[:1].fill_(1)])
def test_what_was_written_all_or_in_part_is_not_named(write, weight):
    expected = torch.nn.Parameter(weight.detach().clone())
    marks = Sentinels({"weight": weight})
    write(weight)
    write(expected)
    assert marks.lift({"weight": weight}) == []
    assert torch.equal(weight, expected)


def test_parameter_that_has_been_replaced_counts_as_written(weight):
    marks = Sentinels({"replaced": weight, "gone": torch.ones(3)})
    assert marks.lift({"replaced": torch.nn.Parameter(torch.ones(4, 25))}) == []


def test_parameter_with_new_memory_counts_as_written(weight):
    marks = Sentinels({"weight": weight})
    weight.data = torch.ones(4, 25)
    assert marks.lift({"weight": weight}) == []


def test_values_that_are_nan_are_not_taken_for_marks():
    weight = torch.zeros(20)
    marks = Sentinels({"weight": weight})
    weight.fill_(torch.nan)
    assert marks.lift({"weight": weight}) == []
    assert weight.isnan().all()


def test_integers_views_and_placeholders_are_left_alone(weight):
    tensors = {
        "integers": torch.zeros(3, dtype=torch.int32),
        "transposed": torch.zeros(2, 3).t(),
        "placeholder": torch.empty(3, device="meta"),
        "empty": torch.empty(0),
    }
    marks = Sentinels(tensors)
    assert not tensors["transposed"].isnan().any()
    assert marks.lift(tensors) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_part_of_what_was_filled_that_nobody_wrote_is_found_and_becomes_zero(dtype):
    weight = torch.empty(4, 25, dtype=dtype)
    fill(weight)
    assert weight.isnan().all()
    weight[:3] = 1
    weight[3, :24] = float("nan")
    assert clear(weight)
    assert weight[3, 24] == 0
    assert weight[3, :24].isnan().all()
    assert not clear(weight)
