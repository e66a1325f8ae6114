# SPDX-License-Identifier: Apache-2.0
"""The wrapped loader, and a layer's way back to stock."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from core.streams import per_expert, per_tensor
from sglang_overlay.core.errors import LayerNotStreamableError
from sglang_overlay.core.layer import LayerStream


def layer_of(streamed):
    notes = []
    name, streams = "model.layers.0.mlp", {"weight": (streamed.placeholder, streamed.stream)}
    layer = LayerStream(
        name,
        streams,
        lambda stream, reason: notes.append((stream.name, reason)),
        lambda stream, reason: notes.append((stream.name, f"lost: {reason}")),
    )
    return layer, notes


def copy_loader(param, loaded_weight):
    """Loads as upstream does."""
    param.data.copy_(loaded_weight)


def adding_loader(param, loaded_weight):
    """A loader nobody foresaw: it needs the parameter's contents."""
    param.data.zero_()
    param.data.add_(loaded_weight)


def test_loader_runs_unchanged_and_keeps_its_name():
    streamed = per_tensor((4, 8))
    layer, notes = layer_of(streamed)
    load = layer.wrap(copy_loader)
    assert load.__name__ == "copy_loader"
    assert load.__doc__ == copy_loader.__doc__
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    load(streamed.placeholder, weight)
    assert streamed.equals(weight)
    assert notes == []


def test_unforeseen_loader_takes_the_layer_back_to_stock():
    streamed = per_tensor((4, 8))
    layer, notes = layer_of(streamed)
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    snapshot = {"weight": streamed.placeholder}
    layer.wrap(lambda param, loaded: param.data.mul_(1).add_(0))(streamed.placeholder, weight)
    layer.wrap(adding_loader)(snapshot["weight"], weight)
    assert not layer.streaming
    assert [name for name, _ in notes] == ["model.layers.0.mlp"]
    assert "mul_" in notes[0][1]
    # Whoever took a reference before loading holds the real parameter now (dict(named_parameters()) snapshots).
    assert snapshot["weight"].device.type == "cpu"
    assert torch.equal(snapshot["weight"].data, weight)


def test_what_was_written_before_is_kept():
    streamed = per_tensor((4, 8))
    layer, _ = layer_of(streamed)
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    layer.wrap(lambda param, loaded: param.data[:2].copy_(loaded))(streamed.placeholder, weight[:2])
    layer.wrap(lambda param, loaded: param.data[2:].index_fill_(0, torch.tensor([0, 1]), 0).add_(loaded))(
        streamed.placeholder, weight[2:]
    )
    assert torch.equal(streamed.placeholder.data, weight)
    assert streamed.account.held == 0


def test_layer_that_went_back_holds_no_memory_of_its_own():
    streamed = per_tensor((4, 8))
    layer, _ = layer_of(streamed)
    placeholder, stream = streamed.placeholder, streamed.stream
    placeholder.weight_loader = layer.wrap(adding_loader)
    del streamed
    placeholder.weight_loader(placeholder, torch.randn(4, 8, dtype=torch.bfloat16))
    fp8, weight = weakref.ref(stream.storage.weight), weakref.ref(placeholder)
    gc.disable()
    try:
        del stream
        assert fp8() is None
        # As where upstream has quantized the weight: its loader refers to the layer, and that not to it.
        del placeholder
        assert weight() is None
    finally:
        gc.enable()


def test_layer_that_cannot_go_back_because_of_a_weak_reference_has_to_be_loaded_anew():
    streamed = per_tensor((4, 8))
    layer, notes = layer_of(streamed)
    held = weakref.ref(streamed.placeholder)
    with pytest.raises(LayerNotStreamableError, match=r"add_.*weakref"):
        layer.wrap(adding_loader)(streamed.placeholder, torch.randn(4, 8, dtype=torch.bfloat16))
    assert held() is streamed.placeholder
    assert notes == []


def test_parameter_class_and_attributes_survive():
    class WeightParameter(torch.nn.Parameter):
        pass

    streamed = per_tensor((4, 8))
    streamed.placeholder.__class__ = WeightParameter
    streamed.placeholder.output_dim = 0
    layer, _ = layer_of(streamed)
    layer.return_to_stock("asked to")
    assert type(streamed.placeholder) is WeightParameter
    assert streamed.placeholder.output_dim == 0
    assert streamed.placeholder.shape == (4, 8)
    assert not streamed.placeholder.is_meta


def test_too_late_is_told_and_loading_goes_on():
    streamed = per_expert((2, 4, 8))
    layer, notes = layer_of(streamed)
    layer.wrap(lambda param, loaded: param.data[0].copy_(loaded))(streamed.placeholder, torch.ones(4, 8))
    layer.wrap(adding_loader)(streamed.placeholder, torch.ones(2, 4, 8))
    layer.wrap(adding_loader)(streamed.placeholder, torch.ones(2, 4, 8))
    assert not layer.streaming
    ((name, reason),) = notes
    assert name == "model.layers.0.mlp"
    assert reason.startswith("lost: ")
    assert "1 of 2 units are quantized already" in reason
    assert streamed.account.held == 0


def test_threads_that_fail_together_fall_back_once():
    streamed = per_tensor((8, 16))
    layer, notes = layer_of(streamed)
    weight = torch.randn(8, 16, dtype=torch.bfloat16)
    barrier = threading.Barrier(4)

    def add_rows(param, loaded, first):
        param.data[first : first + 2].index_fill_(0, torch.tensor([0, 1]), 0).add_(loaded)

    def run(first):
        barrier.wait()
        layer.wrap(add_rows)(streamed.placeholder, weight[first : first + 2], first)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, range(0, 8, 2)))
    assert len(notes) == 1
    assert torch.equal(streamed.placeholder.data, weight)


def test_loader_around_a_wrapped_loader_is_captured_once():
    # qwen3_next and qwen3_5 put a loader of their own around the parameter's.
    streamed = per_tensor((4, 8))
    layer, _ = layer_of(streamed)
    inner = layer.wrap(copy_loader)
    weight = torch.randn(4, 8, dtype=torch.bfloat16)
    layer.wrap(lambda param, loaded: inner(param, loaded))(streamed.placeholder, weight)
    assert streamed.equals(weight)


def test_loader_error_surfaces_as_it_is():
    streamed = per_tensor((4, 8))
    layer, notes = layer_of(streamed)
    with pytest.raises(AssertionError, match="shape"):
        layer.wrap(_asserting_loader)(streamed.placeholder, torch.ones(3, 3))
    assert layer.streaming
    assert notes == []


def _asserting_loader(param, loaded_weight):
    assert param.shape == loaded_weight.shape, "shape"


def test_error_of_a_loader_tells_what_was_being_loaded():
    streamed = per_tensor((4, 8))
    layer, _ = layer_of(streamed)
    tensor = torch.randn(4, 7, dtype=torch.float32)
    streamed.sources.offer(tensor, "h.0.mlp.weight")

    def assert_shape(param, loaded_weight):
        assert param.shape == loaded_weight.shape

    with pytest.raises(AssertionError) as failure:
        layer.wrap(assert_shape)(streamed.placeholder, loaded_weight=tensor[:2])
    assert failure.value.__notes__ == [
        "StreamFP8: raised while loading h.0.mlp.weight (float32 [2, 7]) "
        "into model.layers.0.mlp.weight (bfloat16 [4, 8])"
    ]


def test_error_in_one_of_many_threads_surfaces_once_and_staging_is_given_back():
    shape = (8, 4, 8)
    streamed = per_expert(shape)
    layer, _ = layer_of(streamed)
    weight = torch.randn(shape, dtype=torch.bfloat16)

    def load_half(param, loaded_weight, expert, half):
        param.data[expert].narrow(0, 2 * half, 2).copy_(loaded_weight)

    load = layer.wrap(load_half)
    broken = torch.randn(3, 3)
    tasks = [(weight[expert, :2], expert, 0) for expert in range(8)] + [(broken, 5, 1)]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(load, streamed.placeholder, *task) for task in tasks]
    errors = [future.exception() for future in futures if future.exception()]
    assert len(errors) == 1
    assert "a tensor (float32 [3, 3]) into model.layers.0.mlp.weight" in errors[0].__notes__[0]
    assert streamed.account.held > 0
    layer.drop_staged()
    assert streamed.account.held == 0
