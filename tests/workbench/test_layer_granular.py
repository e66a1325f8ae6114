# SPDX-License-Identifier: Apache-2.0
"""What streaming is compared with gives the same model, and holds whole layers while it loads."""

from __future__ import annotations

import pytest
from workbench.loads.job import LoadJob
from workbench.loads.loads import compare

from sglang_overlay.load import model_load
from sglang_overlay.observe.report import read_folder
from sglang_overlay.offline.plan.job import WHOLE_LAYERS
from sglang_overlay.offline.plan.layers import whole_layers

LAYOUTS = {
    "one file": {},
    "an expert's tensors in different files": {"files": 5, "assignment": "round_robin"},
    "shuffled files": {"files": 5, "file_names": "shuffled"},
}


def staging_of(workers, path, folder, **fields):
    """A load, and the most bytes of staging its first rank held."""
    result = workers.load(LoadJob(path, environ={"SGLANG_STREAMFP8_REPORT": str(folder)}, **fields))
    return result, next(report for report in read_folder(folder) if report.ranks.tp.rank == 0).staging.peak_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_gathering_layers_gives_stocks_model(workers, checkpoint, tmp_path, family, layout):
    path = checkpoint(family, **LAYOUTS[layout])
    stock = workers.load(LoadJob(path, streaming="0"))
    for staging in WHOLE_LAYERS:
        layers, held = staging_of(workers, path, tmp_path / staging, streaming="require", staging=staging)
        assert compare(stock, layers) == [], staging
        assert held > 0


def test_ranks_gather_their_own_parts(workers, checkpoint, tmp_path):
    path = checkpoint("qwen3_moe", files=5)
    fields = {"tp_size": 2, "environ": {"SGLANG_SORT_WEIGHT_FILES": "1"}}
    stock = workers.load(LoadJob(path, streaming="0", **fields))
    for staging in WHOLE_LAYERS:
        layers = workers.load(LoadJob(path, streaming="require", staging=staging, **fields))
        assert compare(stock, layers) == [], staging


def test_a_layers_bf16_bytes_are_held_where_units_hold_few(workers, checkpoint, tmp_path):
    path = checkpoint("qwen3_moe", size="tiny")
    experts, hidden, width = 8, 256, 128
    _, layers = staging_of(workers, path, tmp_path / "layers", streaming="require", staging="layers")
    _, units = staging_of(workers, path, tmp_path / "units", streaming="require")
    assert layers >= experts * 3 * hidden * width * 2
    assert units < layers / experts


def test_loads_after_it_stream_units_again():
    stream = model_load.CheckpointStream
    with whole_layers():
        assert model_load.CheckpointStream is not stream
    assert model_load.CheckpointStream is stream
