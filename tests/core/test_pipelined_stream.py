# SPDX-License-Identifier: Apache-2.0
"""What a stream does with the checkpoint's own memory: jobs beside the loader, pieces that are not copied, progress."""

from __future__ import annotations

import threading

import pytest
from safetensors.torch import load_file, save_file

from core import pipelined
from core.streams import per_expert, per_tensor
from core.test_stream import weight_of
from sglang_overlay.errors import ConflictingWriteError


@pytest.fixture(autouse=True)
def _pipelined(monkeypatch):
    pipelined.use(monkeypatch)


def test_piece_of_a_mapped_file_is_kept_without_memory(tmp_path):
    save_file({"weight": weight_of((2, 8, 64))}, tmp_path / "model.safetensors")
    mapped = load_file(tmp_path / "model.safetensors")["weight"]
    streamed = per_expert((2, 8, 64))
    streamed.sources.offer(mapped)
    with streamed.capture():
        for half in (slice(0, 4), slice(4, 8)):
            for expert in range(2):
                streamed.placeholder.data[expert, half].copy_(mapped[expert, half])
    assert streamed.stream.settle() == []
    assert streamed.equals(weight_of((2, 8, 64)))
    assert streamed.account.peak == 0


def test_checkpoint_tensor_that_is_changed_while_it_is_quantized_is_an_error():
    weight = weight_of((64, 4096))
    streamed = per_tensor((64, 4096))
    streamed.sources.offer(weight)
    slow = streamed.stream._quantizer.quantize
    changed = threading.Event()
    streamed.stream._quantizer.quantize = lambda *args: changed.wait(10) and slow(*args)
    with streamed.capture():
        streamed.placeholder.data.copy_(weight)
    weight.zero_()
    changed.set()
    with pytest.raises(ConflictingWriteError, match="changed after its weight loader returned"):
        streamed.stream.settle()


def test_units_are_reported_when_they_are_quantized():
    weight = weight_of((3, 4, 8))
    streamed = per_expert((3, 4, 8))
    with streamed.capture():
        streamed.placeholder.data[1, :2].copy_(weight[1, :2])
        assert streamed.stream.progress == []
        streamed.placeholder.data[1, 2:].copy_(weight[1, 2:])
        streamed.placeholder.data[:1].copy_(weight[:1])
    assert streamed.stream.settle() == [2]
    assert streamed.stream.progress == [4 * 8, 4 * 8]
