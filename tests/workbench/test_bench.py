# SPDX-License-Identifier: Apache-2.0
"""The benchmark compares neighbours, counts no warm-up, and runs what it says it runs."""

from __future__ import annotations

import json

import pytest
from workbench.bench import CONTENDERS, Run, alternate, document, figures, ratio

NAMES = [contender.name for contender in CONTENDERS]


def rounds_of(*seconds):
    """Runs of each round, the contenders in their order."""
    return [Run(name, value, 200, 100) for found in seconds for name, value in zip(NAMES, found, strict=True)]


def test_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_the_medians():
    runs = rounds_of((1.0, 10.0, 5.0), (10.0, 20.0, 16.0), (2.0, 100.0, 40.0))
    assert ratio(runs, "streaming fp8", "stock fp8", "seconds") == 0.5


def test_figures_are_medians_with_their_range():
    found = figures(rounds_of((1.0, 4.0, 2.0), (3.0, 6.0, 2.5), (2.0, 5.0, 9.0)))
    assert [found[name].seconds for name in NAMES] == [2.0, 5.0, 2.5]
    assert found["streaming fp8"].seconds_range == (2.0, 9.0)
    assert found["stock fp8"].peak_of_final == 2.0


@pytest.fixture(scope="module")
def real(workers, checkpoint):
    """Two counted rounds over a tiny checkpoint, and everything that was run."""
    path, done = checkpoint("qwen3_moe"), []
    return path, alternate(workers, path, 2, done=done.append), done


def test_contenders_alternate_after_a_warm_up_that_is_not_counted(real):
    _, runs, done = real
    assert [run.contender for run in done] == NAMES * 3
    assert runs == done[len(NAMES) :]


def test_loaded_fp8_models_are_smaller_than_bf16(real):
    found = figures(real[1])
    assert found["stock fp8"].final == found["streaming fp8"].final < found["stock bf16"].final


def test_document_is_json_and_says_what_was_run_on_what(real):
    path, runs, _ = real
    data = json.loads(json.dumps(document(runs, path, 1)))
    assert data["checkpoint"] == path.name
    assert data["commit"] != ""
    assert len(data["runs"]) == 6
