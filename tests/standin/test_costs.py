# SPDX-License-Identifier: Apache-2.0
"""What a load asks of a device: copies, waits, and the peak of torch's own allocator."""

from __future__ import annotations

import json
import struct

import pytest
from workbench.loads.updates import Update

from standin.aten import DEVICE_TO_HOST, HOST_TO_DEVICE
from standin.kernels import MIRRORS

FILES = {"files": 3, "assignment": "round_robin"}
COUNTED = {"recorder": "standin.aten:counted"}


LOADER_THREADS = 8
ANSWERS = 3
"""Of the device at the end of any load: what nobody wrote, and which weights and which others are not finite."""


def tensors_in(checkpoint):
    """Name and bytes of each tensor in its files."""
    found = {}
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        found.update({name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()})
    return found


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_each_tensor_goes_to_the_device_once_and_three_answers_are_awaited(family, checkpoint, loaded):
    path = checkpoint(family, **FILES)
    stock, streamed = (loaded("h200", path, mode, **COUNTED).ranks[0].recorded for mode in ("0", "require"))
    assert stock[HOST_TO_DEVICE] >= len(tensors_in(path))
    assert streamed[HOST_TO_DEVICE] <= stock[HOST_TO_DEVICE]
    assert streamed[DEVICE_TO_HOST] <= stock[DEVICE_TO_HOST] + ANSWERS


@pytest.mark.every_release
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_main_thread_is_the_first_to_use_a_kernel(family, checkpoint, loaded):
    """SGLang builds most on first use, and DeepSeek's loader has eight threads."""
    job = loaded("h200", checkpoint(family, **FILES), "require", recorder="standin.aten:first_uses")
    uses = {name: thread for name, thread in job.ranks[0].recorded.items() if name in MIRRORS}
    assert uses
    assert set(uses.values()) == {"MainThread"}


@pytest.mark.patched
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_peak_of_the_allocator_is_near_the_model(family, checkpoint, loaded):
    path = checkpoint(family, size="demo", overrides=(("num_hidden_layers", 4),), **FILES)
    stock, streamed = (loaded("h200", path, mode, described="sizes").ranks[0] for mode in ("0", "require"))
    sizes = tensors_in(path)
    # What does not grow with a model: SGLang reads these in bf16 before it quantizes them ...
    deferred = sum(size for name, size in sizes.items() if "kv_b_proj" in name)
    # ... and each loader thread has a unit, gate and up of an expert, in bf16 and fp8.
    in_flight = LOADER_THREADS * 3 * max(size for name, size in sizes.items() if name.endswith("gate_proj.weight"))
    assert streamed.memory.peak_above_start <= 1.02 * streamed.model_bytes + deferred + in_flight
    assert streamed.memory.peak_above_start <= 0.55 * stock.memory.peak_above_start


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_an_update_launches_no_more_than_a_load_and_awaits_what_it_keeps(family, checkpoint, loaded):
    path = checkpoint(family, **FILES)
    (rank,) = loaded("h200", path, updates=(Update("disk", path, recorder="standin.aten:counted"),), **COUNTED).ranks
    (done,) = rank.updates
    assert done.success, done.message
    load, update = rank.recorded, done.recorded
    awaited, answers = update.pop(DEVICE_TO_HOST), load.pop(DEVICE_TO_HOST)
    # Copies to the host are what is kept to undo it: of each unit, of each parameter's scales, and of what is in bf16.
    assert update[HOST_TO_DEVICE] <= load[HOST_TO_DEVICE]
    assert update.total() - awaited <= load.total() - answers
    assert awaited <= answers + len(tensors_in(path)) + 10


@pytest.mark.parametrize("source", ["tensor", "bucket"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_the_peak_of_an_update_is_a_bucket_and_two_units_of_each_thread(family, source, checkpoint, loaded):
    path = checkpoint(family, size="demo", overrides=(("num_hidden_layers", 4),))
    (rank,) = loaded("h200", path, updates=(Update(source, path, calls=8),) * 2, described="sizes").ranks
    sizes = tensors_in(path)
    unit = 2 * max(size for name, size in sizes.items() if name.endswith("gate_proj.weight"))
    # SGLang reads these in bf16 before it quantizes them.
    deferred = sum(size for name, size in sizes.items() if "kv_b_proj" in name)
    for done in rank.updates:
        assert done.success, done.message
        bucket = done.bucket if source == "bucket" else 0
        assert done.memory.peak_above_start <= bucket + 2 * LOADER_THREADS * unit + deferred
    first, second = (done.memory.start for done in rank.updates)
    assert second <= first
