# SPDX-License-Identifier: Apache-2.0
"""Memory regressions do not get past the baselines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from workbench.bench import baselines, readme
from workbench.bench.baselines_view import describe
from workbench.bench.plans import CHECKED_ALWAYS, PAGE, compute, published, to_markdown

from sglang_overlay.hooks import releases
from sglang_overlay.offline.plan.planner import Request, collect
from sglang_overlay.offline.plan.process import Planners


@pytest.fixture(scope="module")
def request_(checkpoint):
    overrides = (("hidden_size", 512), ("moe_intermediate_size", 512), ("num_experts", 32))
    return Request(checkpoint("qwen3_moe", files=6, overrides=overrides), modes=("streaming",))


def found_by(planners, request):
    return baselines.planned("moe", collect(request, planners.run(request.jobs())))


@pytest.fixture(scope="module")
def before(request_, planners):
    return found_by(planners, request_).figures


def differences_with(task, request, before):
    with Planners(1, f"harness.regressions:{task}") as planners:
        now = found_by(planners, request)
    return now, {difference.figure: difference for difference in now.compare(before)}


def test_the_same_code_gives_the_same_figures(request_, before, planners):
    assert found_by(planners, request_).compare(before) == []


def test_a_held_bf16_reference_is_caught(request_, before, tmp_path):
    now, found = differences_with("held_reference", request_, before)
    assert found["peak_bytes"].now > 2 * found["peak_bytes"].before
    assert "final_bytes" not in found
    text = describe(now, before, list(found.values()), tmp_path)
    for expected in ("moe", "streaming", "peak_bytes", found["peak_bytes"].change, "--refresh"):
        assert expected in text
    assert str(tmp_path / "moe.png") in text
    assert (tmp_path / "moe.png").stat().st_size > 10_000


def test_layer_sized_staging_is_caught(request_, before):
    _, found = differences_with("layer_sized_staging", request_, before)
    assert found["staging_peak_bytes"].now > 10 * found["staging_peak_bytes"].before
    assert found["peak_bytes"].now > found["peak_bytes"].before


def test_a_baseline_that_is_refreshed_is_read_back(request_, before, planners, tmp_path):
    path = baselines.refresh(found_by(planners, request_), "0.5.23", tmp_path)
    assert baselines.read(path)["planned"] == before
    assert json.loads(path.read_text()) == baselines.read(path)
    assert sum("samples" in line for line in path.read_text().splitlines()) == 1


def test_measured_peaks_may_be_higher_by_the_tolerance_and_lower_by_anything():
    before = {"stock": {"peak_bytes": 1000}}
    for peak, found in ((500, 0), (1030, 0), (1031, 1)):
        assert len(baselines.measured("moe", {"stock": peak}).compare(before)) == found


def test_the_pages_show_the_newest_releases_baselines():
    release = releases.supported()[-1]
    found = [(plan, baselines.read(baselines.path_of(release, plan.name))) for plan in published()]
    assert [plan.name for plan, baseline in found if not baseline] == []
    assert PAGE.read_text(encoding="utf-8") == to_markdown(release, found)
    bench = json.loads(readme.BENCH.read_text(encoding="utf-8"))
    page = readme.PAGE.read_text(encoding="utf-8")
    assert page == readme.with_table(page, bench, found)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", CHECKED_ALWAYS)
def test_what_is_planned_now_is_what_the_baseline_says(name, planners):
    """``ci/baseline``, which runs every night, compares all of them."""
    path = baselines.path_of(releases.installed(), name)
    if not path.exists():
        pytest.skip(f"{name} has no baseline for SGLang {releases.installed()}; ci/baseline --refresh makes one")
    ((_, plan),) = compute(planners, published([name]))
    now, before = baselines.planned(name, plan), baselines.read(path)["planned"]
    differences = now.compare(before)
    if differences:
        pytest.fail("\n" + describe(now, before, differences, Path("baseline-charts")), pytrace=False)
