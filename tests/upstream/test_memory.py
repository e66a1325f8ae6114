# SPDX-License-Identifier: Apache-2.0
"""Peak memory of a load of more than 2 GB, measured in the process that loads: the bounds this project is for."""

from __future__ import annotations

import pytest
from workbench.loads import LoadJob

pytestmark = [pytest.mark.memory, pytest.mark.every_release]


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def loads(request, workers, checkpoint):
    """A stock and a streaming load of a bf16 MoE model with 64 experts a layer, each in a process of its own."""
    path = checkpoint(request.param, size="bench_2g", files=4)
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) > 2e9
    return {mode: workers.load_fresh(LoadJob(path, streaming=mode)).ranks[0] for mode in ("0", "require")}


def test_streaming_peaks_within_a_twentieth_of_the_loaded_model(loads):
    """What a process needs once (threads, compiled loops) is 2 to 4 % of so small a model."""
    streaming = loads["require"]
    assert streaming.memory.peak_above_start <= 1.05 * streaming.model_bytes


def test_streaming_peaks_below_six_tenths_of_stock(loads):
    assert loads["require"].memory.peak_above_start <= 0.60 * loads["0"].memory.peak_above_start


def test_measure_sees_what_stock_holds(loads):
    assert loads["0"].memory.peak_above_start >= 2 * loads["0"].model_bytes
    assert loads["0"].model_bytes == loads["require"].model_bytes
