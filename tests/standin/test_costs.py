# SPDX-License-Identifier: Apache-2.0
"""What a load asks of a device: copies, waits, and the peak of torch's own allocator."""

from __future__ import annotations

import json
import struct

import pytest

from standin.aten import DEVICE_TO_HOST, HOST_TO_DEVICE

FILES = {"files": 3, "assignment": "round_robin"}
COUNTED = {"recorder": "standin.aten:counted"}


def tensors_in(checkpoint):
    """Number of tensors in its files."""
    found = 0
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            found += len(json.loads(opened.read(size)).keys() - {"__metadata__"})
    return found


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_each_tensor_goes_to_the_device_once_and_nothing_is_awaited_that_stock_does_not_await(
    family, checkpoint, loaded
):
    path = checkpoint(family, **FILES)
    stock, streamed = (loaded("h200", path, mode, **COUNTED).ranks[0].recorded for mode in ("0", "require"))
    bf16 = loaded("h200", path, "0", quantization=None, **COUNTED).ranks[0].recorded
    assert bf16[HOST_TO_DEVICE] >= tensors_in(path)
    assert streamed[HOST_TO_DEVICE] <= bf16[HOST_TO_DEVICE]
    assert streamed[DEVICE_TO_HOST] <= stock[DEVICE_TO_HOST]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_peak_of_the_allocator_is_near_the_model(family, checkpoint, loaded):
    path = checkpoint(family, size="demo", overrides=(("num_hidden_layers", 4),), **FILES)
    stock, streamed = (loaded("h200", path, mode, described="sizes").ranks[0] for mode in ("0", "require"))
    assert streamed.memory.peak_above_start <= 1.02 * streamed.model_bytes
    assert streamed.memory.peak_above_start <= 0.55 * stock.memory.peak_above_start
