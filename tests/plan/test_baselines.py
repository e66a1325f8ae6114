# SPDX-License-Identifier: Apache-2.0
"""Memory regressions do not get past the baselines."""

from __future__ import annotations

import json

import pytest
from workbench import baselines
from workbench.baselines_cli import chart, table
from workbench.plans import PAGE, compute, published, to_markdown

from sglang_overlay.observe import terminal
from sglang_overlay.plan.planner import Request, collect
from sglang_overlay.plan.process import Planners
from sglang_overlay.upstream import releases


@pytest.fixture(scope="module")
def request_(checkpoint):
    overrides = (("hidden_size", 512), ("moe_intermediate_size", 512), ("num_experts", 32))
    return Request(checkpoint("qwen3_moe", files=6, overrides=overrides), modes=("streaming",))


@pytest.fixture(scope="module")
def baseline(request_, planners):
    return baselines.figures_of(collect(request_, planners.run(request_.jobs())))


def differences_with(task, request, baseline):
    with Planners(1, f"workbench.regressions:{task}") as planners:
        now = baselines.figures_of(collect(request, planners.run(request.jobs())))
    return now, {found.figure: found for found in baselines.compare_planned("moe", baseline, now)}


def test_the_same_code_gives_the_same_figures(request_, baseline, planners):
    now = baselines.figures_of(collect(request_, planners.run(request_.jobs())))
    assert baselines.compare_planned("moe", baseline, now) == []


def test_a_held_bf16_reference_is_caught(request_, baseline, tmp_path, capsys):
    now, found = differences_with("held_reference", request_, baseline)
    assert found["peak_bytes"].now > 2 * found["peak_bytes"].before
    assert "final_bytes" not in found
    terminal.console().print(table(list(found.values())))
    text = capsys.readouterr().out
    assert "moe" in text
    assert "peak_bytes" in text
    assert found["peak_bytes"].change in text
    assert chart("moe", baseline, now, tmp_path).stat().st_size > 10_000


def test_layer_sized_staging_is_caught(request_, baseline):
    _, found = differences_with("layer_sized_staging", request_, baseline)
    assert found["staging_peak_bytes"].now > 10 * found["staging_peak_bytes"].before


def test_a_baseline_that_is_written_is_read_back(baseline, tmp_path):
    path = baselines.path_of("0.5.23", "moe", tmp_path)
    baselines.write(path, {"name": "moe", "planned": baseline})
    assert baselines.read(path)["planned"] == baseline
    assert json.loads(path.read_text()) == baselines.read(path)
    assert sum("samples" in line for line in path.read_text().splitlines()) == 1


def test_measured_peaks_may_be_higher_by_the_tolerance_and_lower_by_anything():
    before = {"stock": {"peak_bytes": 1000}}
    for peak, found in ((500, 0), (1030, 0), (1031, 1)):
        assert len(baselines.compare_measured("moe", before, {"stock": {"peak_bytes": peak}})) == found


def test_the_page_shows_the_baselines():
    release = releases.installed()
    found = [(plan, baselines.read(baselines.path_of(release, plan.name))) for plan in published()]
    assert PAGE.read_text(encoding="utf-8") == to_markdown(release, [pair for pair in found if pair[1]])


@pytest.mark.timeout(900)
def test_what_is_planned_now_is_what_the_baseline_says(planners):
    """One published model; ``ci/baseline`` compares all of them."""
    (asked,) = (plan for plan in published(["Qwen1.5-MoE-A2.7B"]) if (plan.tp, plan.order) == (8, "sorted"))
    ((_, plan),) = compute(planners, [asked])
    before = baselines.read(baselines.path_of(releases.installed(), asked.name))["planned"]
    assert baselines.compare_planned(asked.name, before, baselines.figures_of(plan)) == []
