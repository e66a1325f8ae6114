# SPDX-License-Identifier: Apache-2.0
"""What waits for its unit in high precision is a unit or two a loader thread, however many layers there are."""

from __future__ import annotations

import os

import pytest
from harness.streamed import assert_streamed, load_reported
from workbench.loads.checkpoints import CheckpointSpec, model_config
from workbench.loads.job import LoadJob

LOADER_THREADS = {"qwen3": 1, "qwen3_moe": 1, "deepseek_v3": (os.cpu_count() or 1) + 4}
"""DeepSeek's ``load_weights`` has a ``ThreadPoolExecutor`` of the default size."""


def largest_unit(family: str) -> int:
    """Bytes in bf16 of a merged linear layer (one scale) or an expert's w13, whichever is more."""
    config = model_config(CheckpointSpec(family))
    width = max(config["intermediate_size"], config.get("moe_intermediate_size", 0))
    return 2 * config["hidden_size"] * width * 2


@pytest.mark.parametrize("file_names", ["ordered", "shuffled"])
@pytest.mark.parametrize("family", LOADER_THREADS)
def test_staging_stays_below_two_units_a_loader_thread(workers, checkpoint, tmp_path, family, file_names):
    path = checkpoint(family, files=3, file_names=file_names, overrides=(("num_hidden_layers", 5),))
    # A mapped file's pages cost nothing while they wait; without the mapping every piece that waits is a copy.
    # Read one after another: SGLang's threads deliver files in the order in which they get done. Quantized by the
    # loader: complete units wait for worker threads as long as the machine keeps those from running.
    job = LoadJob(
        path,
        streaming="require",
        without="threads",
        loader_config={"enable_multithread_load": False},
        server_args={"weight_loader_disable_mmap": True},
    )
    _, (report,) = load_reported(workers.load, job, tmp_path)
    assert_streamed([report])
    assert 0 < report.staging.peak_bytes <= 2 * largest_unit(family) * LOADER_THREADS[family]
