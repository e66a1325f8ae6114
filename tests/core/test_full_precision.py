# SPDX-License-Identifier: Apache-2.0
"""A weight that upstream reads in high precision is there, whole, once all of it has come; and gone afterwards."""

from __future__ import annotations

import pytest
import torch

from sglang_overlay.core.capture import WriteCapture, storage_key
from sglang_overlay.core.full_precision import FullPrecisionParameter
from sglang_overlay.core.partial_capture import PartialCapture
from sglang_overlay.errors import UnsupportedWriteError

CPU = torch.device("cpu")


@pytest.fixture
def placeholder():
    parameter = torch.nn.Parameter(torch.empty(4, 6, dtype=torch.bfloat16, device="meta"), requires_grad=False)
    parameter.output_dim = 0
    return parameter


@pytest.fixture
def whole(placeholder):
    return FullPrecisionParameter("layer.weight", placeholder, CPU)


def capture(whole, placeholder, kind=WriteCapture):
    return kind({storage_key(placeholder): whole})


def test_placeholder_holds_the_values_once_all_parts_have_come(whole, placeholder):
    values = torch.randn(4, 6, dtype=torch.bfloat16)
    looked_up_before = placeholder
    with capture(whole, placeholder):
        placeholder.data[:2].copy_(values[:2])
        assert placeholder.is_meta
        assert whole.is_partial
        placeholder.data[1:].copy_(values[1:])
    assert torch.equal(looked_up_before, values)
    assert torch.equal(whole.values, values)
    assert not whole.is_partial
    assert looked_up_before.output_dim == 0


def test_values_are_copied_so_that_a_sender_may_use_its_memory_again(whole, placeholder):
    source = torch.ones(4, 6, dtype=torch.bfloat16)
    with capture(whole, placeholder):
        placeholder.data.copy_(source)
    source.zero_()
    assert torch.equal(placeholder, torch.ones(4, 6, dtype=torch.bfloat16))


def test_reset_leaves_a_placeholder_that_takes_writes_again(whole, placeholder):
    sinks = {storage_key(placeholder): whole}
    for number in (1.0, 2.0):
        with WriteCapture(sinks):
            placeholder.data.copy_(torch.full((4, 6), number))
        assert float(whole.values.sum()) == 24 * number
        whole.reset()
        assert placeholder.is_meta
        assert whole.values is None


def test_values_that_came_in_inference_mode_may_be_written_again_by_a_thread_outside(whole, placeholder):
    with torch.inference_mode(), capture(whole, placeholder):
        placeholder.data.copy_(torch.ones(4, 6))
    with torch.no_grad():
        placeholder.copy_(torch.full((4, 6), 2.0))
    assert float(whole.values.sum()) == 48


def test_what_is_computed_from_an_unwritten_weight_leaves_its_destination_alone(whole, placeholder):
    derived, real = torch.ones(6, 4), torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    with capture(whole, placeholder, PartialCapture):
        derived.copy_(placeholder.t().contiguous())
        real.data.copy_(torch.ones(2))
    assert torch.equal(derived, torch.ones(6, 4))
    assert torch.equal(real, torch.ones(2))


def test_plain_capture_refuses_what_is_computed_from_an_unwritten_weight(whole, placeholder):
    with capture(whole, placeholder), pytest.raises(UnsupportedWriteError):
        torch.ones(6, 4).copy_(placeholder.t())
