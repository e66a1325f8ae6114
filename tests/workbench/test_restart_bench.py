"""Restarts are measured with a dump that is written anew in each round, and bytes are those that leave the disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workbench.bench import restart_bench
from workbench.bench.bench import Case, Run, figures
from workbench.bench.restart_bench import FIRST, SECOND, cached_bytes, evict, measure_restarts, with_table
from workbench.loads.checkpoints import CheckpointSpec

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED = DOCS / "restart.json"


def test_pages_that_are_read_are_counted(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    evict(file)
    assert cached_bytes(file) == 0
    with file.open("rb") as opened:
        opened.read()
    assert cached_bytes(file) == 1 << 20


@pytest.mark.needs("sglang.srt.model_loader.loader.PreshardedModelLoader.load_model")
def test_second_start_reads_only_what_the_first_has_written(workers, checkpoint_folder):
    done = []
    case = Case("tiny", 0.01, CheckpointSpec("qwen3_moe", size="demo"))
    result = measure_restarts(workers, case, checkpoint_folder, 1, done.append)
    assert [run.contender for run in done] == 2 * ["stock bf16", "streaming", FIRST, SECOND]
    found = figures(result.runs)
    assert result.bytes_read["streaming"] >= result.checkpoint_bytes
    # A dump has no buffers that are not persistent.
    assert 0.99 * found[SECOND].final < result.bytes_read[SECOND] < 1.05 * found[SECOND].final
    assert list(restart_bench.rows_of(restart_bench.document([result])))[3][1] == SECOND


def test_page_shows_the_published_runs_in_which_only_fp8_is_read():
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    page = (DOCS / "questions" / "autoscaling.md").read_text(encoding="utf-8")
    assert with_table(page, published) == page
    for case in published["cases"]:
        final = figures([Run(**run) for run in case["runs"]])[SECOND].final
        assert case["bytes_read"][SECOND] < 1.02 * final
