# SPDX-License-Identifier: Apache-2.0
"""What is done to placeholders outside of their loaders: plain writes stream, and all else finds a real parameter."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch

from core.streams import per_tensor
from core.test_layer import layer_of
from sglang_overlay.core.bypass_capture import BypassCapture

WEIGHT = torch.randn(4, 8, dtype=torch.bfloat16)


class OwnParameter(torch.nn.Parameter):
    """Not watched, as upstream's own parameters are not."""


@pytest.fixture(params=["plain", "own class"])
def streamed(request):
    made = per_tensor((4, 8))
    if request.param == "own class":
        made.placeholder.__class__ = OwnParameter
    return made


def whole(param):
    param.data.copy_(WEIGHT)


def in_slices(param):
    param.data[:1] = WEIGHT[:1]
    with torch.no_grad():
        param[1:].copy_(WEIGHT[1:])


def in_a_thread(param):
    thread = threading.Thread(target=whole, args=(param,))
    thread.start()
    thread.join()


def through_an_old_view(param):
    view = param.data
    view[2:].copy_(WEIGHT[2:])
    view[:2].copy_(WEIGHT[:2])


@pytest.mark.parametrize("write", [whole, in_slices, in_a_thread, through_an_old_view])
def test_plain_write_streams(write, streamed):
    layer, notes = layer_of(streamed)
    with BypassCapture([layer]):
        write(streamed.placeholder)
    assert streamed.equals(WEIGHT)
    assert notes == []


def test_number_is_written(streamed):
    layer, notes = layer_of(streamed)
    with BypassCapture([layer]):
        streamed.placeholder.data[...] = 1.5
        streamed.placeholder.data[1:].fill_(2)
        streamed.placeholder.data[3].zero_()
    streamed.stream.settle()
    assert streamed.equals(torch.tensor([1.5, 2, 2, 0], dtype=torch.bfloat16).view(4, 1).expand(4, 8).contiguous())
    assert notes == []


def by_arithmetic(param):
    param.data[:2].mul_(2)


def by_indices(param):
    param.data[torch.tensor([0, 1])] = WEIGHT[:2] * 2


def by_doubling_in_place(param):
    param.data[:2] *= 2


@pytest.mark.parametrize("change", [by_arithmetic, by_indices, by_doubling_in_place])
def test_any_other_change_finds_a_real_parameter(change, streamed):
    layer, notes = layer_of(streamed)
    view = streamed.placeholder.data
    with BypassCapture([layer]):
        streamed.placeholder.data[:2].copy_(WEIGHT[:2])
        change(streamed.placeholder)
        # The parameter has got other memory meanwhile.
        view[2:].copy_(WEIGHT[2:])
    assert torch.equal(streamed.placeholder.data, torch.cat([WEIGHT[:2] * 2, WEIGHT[2:]]))
    assert len(notes) == 1
    assert "outside of its weight loader" in notes[0][1]
    assert "lost" not in notes[0][1]


READS = {
    "copy_": lambda tensor: torch.empty(2, 8, dtype=torch.bfloat16).copy_(tensor),
    "cpu": lambda tensor: tensor.cpu(),
    "to": lambda tensor: tensor.to("cpu"),
    "tolist": lambda tensor: torch.tensor(tensor.tolist(), dtype=torch.bfloat16),
}


@pytest.mark.parametrize("read", READS)
def test_read_finds_what_was_written(read, streamed):
    layer, notes = layer_of(streamed)
    with BypassCapture([layer]):
        streamed.placeholder.data[:2].copy_(WEIGHT[:2])
        assert torch.equal(READS[read](streamed.placeholder.data[:2]), WEIGHT[:2])
    assert len(notes) == 1
    assert "lost" not in notes[0][1]


def test_change_of_what_is_quantized_is_a_loss(streamed):
    layer, notes = layer_of(streamed)
    with BypassCapture([layer]):
        streamed.placeholder.data.copy_(WEIGHT)
        streamed.placeholder.data.mul_(2)
    assert notes[0][1].startswith("lost: ")
    assert "mul_" in notes[0][1]


def test_tensors_of_others_are_as_without_it(streamed):
    layer, _ = layer_of(streamed)
    other = torch.zeros(3, device="meta")
    with BypassCapture([layer]):
        other.copy_(torch.ones(3)).add_(1)
        other[0] = 2.0
        assert torch.zeros(2, device="meta").fill_(1).is_meta
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            torch.ones(3).copy_(other)
    streamed.placeholder.data.copy_(WEIGHT)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        torch.ones(3).copy_(other)
    assert streamed.stream.done_units == 0


def test_one_capture_inside_another_sees_its_own(streamed):
    inner = per_tensor((4, 8))
    layers = [layer_of(streamed)[0], layer_of(inner)[0]]
    with BypassCapture(layers[:1]):
        with BypassCapture(layers[1:]):
            whole(inner.placeholder)
        whole(streamed.placeholder)
    assert inner.equals(WEIGHT)
    assert streamed.equals(WEIGHT)


def test_nothing_is_kept_afterwards(streamed):
    layer, _ = layer_of(streamed)
    capture = BypassCapture([layer])
    with capture:
        whole(streamed.placeholder)
    layer.finish()
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None
