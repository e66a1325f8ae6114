# SPDX-License-Identifier: Apache-2.0
"""The benchmark of updates compares the same tensors in the same calls, and says what is kept to undo them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from workbench.bench import bench_cli
from workbench.bench.bench import Case
from workbench.bench.update_bench import (
    FRESH,
    SOURCES,
    UpdateRun,
    measure_updates,
    name_of,
    rows_of,
    runs_of,
)
from workbench.loads.checkpoints import CheckpointSpec

NAMES = [FRESH, *(name_of(model, source) for source in SOURCES for model in ("bf16", "fp8"))]


@pytest.fixture(scope="module")
def real(workers, checkpoint_folder):
    """One counted round over a tiny checkpoint in four calls, and everything that was run."""
    case, done = Case("tiny", 0.01, CheckpointSpec("qwen3_moe"), threads=1), []
    return measure_updates(workers, case, checkpoint_folder, 1, done=done.append, bucket=1_000_000), done


def test_each_model_is_updated_in_each_way_after_a_round_that_is_not_counted(real):
    result, done = real
    assert sorted(run.contender for run in result.runs) == sorted(NAMES)
    assert list(result.runs) == done[len(NAMES) :]


def test_both_models_get_the_same_calls_and_only_streamed_ones_keep_what_they_replace(real):
    runs = {run.contender: run for run in real[0].runs}
    for source in SOURCES:
        stock, streamed = (runs[name_of(model, source)] for model in ("bf16", "fp8"))
        assert stock.bucket == streamed.bucket
        assert (stock.bucket > 0) is (source != "disk")
        assert stock.undo == 0
        # But for what no update replaces, such as the table of a rotary embedding.
        assert 0.7 * streamed.final < streamed.undo <= streamed.final


def test_rows_tell_an_update_by_stocks_own_and_by_the_fresh_load():
    runs = [UpdateRun(FRESH, 3.0, 3.0, 10, 5)]
    for source in SOURCES:
        runs.append(UpdateRun(name_of("bf16", source), 2.0, 2.0, 2_000_000, 9_000_000, bucket=1_000_000))
        runs.append(UpdateRun(name_of("fp8", source), 6.0, 2.0, 8_000_000, 5_000_000, bucket=1_000_000, undo=5_000_000))
    rows = {row[1]: row[2:] for row in rows_of("tiny", runs)}
    assert rows["fp8 by tensors"] == ["6.00", "3.00", "2.00", "8.00 MB", "5.00 MB", "", "3.00 MB"]
    assert rows["fp8 by buckets"] == ["6.00", "3.00", "2.00", "8.00 MB", "5.00 MB", "1.00 MB", "2.00 MB"]


def test_command_measures_writes_and_draws(monkeypatch, tmp_path):
    tiny = Case("tiny", 0.01, CheckpointSpec("qwen3_moe", files=3, seed=77))
    monkeypatch.setenv("STREAMFP8_CACHE", str(tmp_path))
    monkeypatch.setattr(bench_cli, "size_cases", lambda *_: [tiny])
    page, data, chart = (tmp_path / name for name in ("page.md", "bench.json", "bench.svg"))
    page.write_text("<!-- ci/bench --updates writes this table -->\n<!-- its end -->\n")
    arguments = ["--updates", "--rounds", "1", "--json", data, "--png", chart, "--page", page]
    answer = CliRunner().invoke(bench_cli.main, [*map(str, arguments)], catch_exceptions=False)
    assert answer.exit_code == 0
    (case,) = json.loads(data.read_text())["cases"]
    assert sorted(run.contender for run in runs_of(case)) == sorted(NAMES)
    assert all(name in answer.output and name in page.read_text() for name in NAMES)
    assert "<svg" in chart.read_text()
    assert "fp8 by buckets" in chart.read_text()
