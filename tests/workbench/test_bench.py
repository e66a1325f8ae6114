# SPDX-License-Identifier: Apache-2.0
"""The benchmark compares neighbours, counts no warm-up, runs what it says it runs, and says where."""

from __future__ import annotations

import getpass
import json
import platform
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from workbench.bench import bench_cli
from workbench.bench.ablations import ABLATIONS
from workbench.bench.bench import (
    ABLATED,
    BENCH_FAMILIES,
    CONTENDERS,
    INTERCEPTING,
    ONE_PASS,
    ORDERS,
    Case,
    Run,
    figures,
    measure,
    ratio,
    scaling_cases,
    size_cases,
    sized_spec,
)
from workbench.bench.bench_chart import draw
from workbench.bench.bench_document import document, with_table
from workbench.bench.readme import BENCH
from workbench.loads.checkpoints import CheckpointSpec, build, tensor_plans
from workbench.loads.job import LoadJob
from workbench.loads.loads import compare

NAMES = [contender.name for contender in CONTENDERS]
PNG = b"\x89PNG\r\n\x1a\n"


def rounds_of(*seconds):
    """Runs of each round, the contenders in their order."""
    return [
        Run(name, value, 2 * value, 200, 100) for found in seconds for name, value in zip(NAMES, found, strict=True)
    ]


def test_ratio_is_the_median_of_the_rounds_ratios_not_the_ratio_of_the_medians():
    runs = rounds_of((1.0, 10.0, 1.0, 1.0, 5.0), (10.0, 20.0, 1.0, 1.0, 16.0), (2.0, 100.0, 1.0, 1.0, 40.0))
    assert ratio(runs, "streaming", "stock fp8", "seconds") == 0.5


@pytest.fixture(scope="module")
def published():
    """What the table of docs/figures.md is made of."""
    return json.loads(BENCH.read_text(encoding="utf-8"))


def test_page_shows_the_published_runs_and_nothing_else(published):
    page = (BENCH.parent / "figures.md").read_text(encoding="utf-8")
    assert with_table(page, published) == page


def test_published_runs_are_within_the_bounds_that_this_project_has_set_itself(published):
    assert len(published["cases"]) == 4
    for case in published["cases"]:
        runs = [Run(**run) for run in case["runs"]]
        assert case["checkpoint_bytes"] > 4e9
        assert len(runs) == 5 * len(CONTENDERS)
        assert figures(runs)["streaming"].peak_of_final <= 1.03
        assert ratio(runs, "streaming", "stock fp8", "seconds") <= 0.55
        if case["family"] == "qwen3_moe":
            assert ratio(runs, "streaming", "stock bf16", "seconds") <= 1.0


def test_figures_are_medians_with_their_range():
    found = figures(rounds_of((1.0, 4.0, 7.0, 6.0, 2.0), (3.0, 6.0, 8.0, 6.0, 2.5), (2.0, 5.0, 9.0, 6.0, 9.0)))
    assert [found[name].seconds for name in NAMES] == [2.0, 5.0, 8.0, 6.0, 2.5]
    assert found["streaming"].seconds_range == (2.0, 9.0)
    assert found["streaming"].cpu_seconds == 5.0
    assert found["stock fp8"].peak_of_final == 2.0


@pytest.mark.parametrize("family", BENCH_FAMILIES)
@pytest.mark.parametrize("gigabytes", [0.5, 1, 2, 4, 8])
def test_checkpoints_have_about_the_size_that_was_asked_for(family, gigabytes):
    weights = sum(plan.nbytes for plan in tensor_plans(sized_spec(family, gigabytes)))
    assert weights == pytest.approx(gigabytes * 1e9, abs=0.2e9)


def test_every_family_is_measured_in_every_order_at_every_size():
    cases = size_cases(BENCH_FAMILIES, [0.5, 1], ORDERS)
    assert len(cases) == len({case.name for case in cases}) == 3 * 3 * 2
    staggered = [case for case in cases if case.order == "staggered"]
    assert all(case.tp_size == 2 and case.environ["SGLANG_SORT_WEIGHT_FILES"] == "1" for case in staggered)
    shuffled = [case for case in cases if case.order == "shuffled"]
    assert all(case.spec.file_names == "shuffled" and case.spec.files >= 4 for case in shuffled)


def test_scaling_varies_one_thing_at_a_time():
    series = scaling_cases([1, 2])
    assert [case.value for case in series["size"]] == [0.5, 1, 2, 4, 8]
    assert {dict(case.spec.overrides)["num_experts"] for case in series["layers"]} == {32}
    assert {dict(case.spec.overrides)["num_hidden_layers"] for case in series["experts"]} == {2}
    assert len({case.spec for case in series["threads"]}) == 1
    assert [case.threads for case in series["threads"]] == [1, 2]


@pytest.fixture(scope="module")
def real(workers, checkpoint_folder):
    """Two counted rounds over a tiny checkpoint, and everything that was run."""
    case, done = Case("tiny", 0.01, CheckpointSpec("qwen3_moe"), threads=1), []
    return measure(workers, case, checkpoint_folder, 2, done=done.append), done


def test_contenders_alternate_after_a_warm_up_that_is_not_counted(real):
    result, done = real
    assert [run.contender for run in done] == NAMES * 3
    assert list(result.runs) == done[len(NAMES) :]


def test_loaded_fp8_models_are_smaller_than_bf16(real):
    found = figures(real[0].runs)
    sizes = {found[name].final for name in NAMES[1:]}
    assert len(sizes) == 1
    assert sizes.pop() < found["stock bf16"].final


def test_document_says_what_was_run_on_what_and_names_nobody(real):
    text = json.dumps(document([real[0]]))
    data = json.loads(text)
    assert [len(case["runs"]) for case in data["cases"]] == [2 * len(CONTENDERS)]
    assert data["commit"]
    assert data["versions"]["sglang"] != "unknown"
    assert data["machine"]["cores"] > 0
    assert data["machine"]["memory_bytes"] > 2**30
    assert not re.search(rf"\b{re.escape(platform.node())}\b", text)
    assert str(Path.home()) not in text
    assert f'"{getpass.getuser()}"' not in text


def test_chart_has_a_column_for_each_series(real, tmp_path):
    draw({"one": [real[0]], "two": [real[0], real[0]]}, {"one": "GB", "two": "layers"}, tmp_path / "c" / "c.png", "t")
    assert (tmp_path / "c" / "c.png").read_bytes().startswith(PNG)


def test_what_only_intercepts_takes_everything_and_quantizes_nothing(workers, checkpoint_folder):
    job = LoadJob(build(CheckpointSpec("qwen3_moe"), checkpoint_folder), streaming="require")
    quantized = workers.load(job)
    # Where anything was missing this would be an error.
    taken = workers.load(replace(job, quantizing="none"))
    assert taken.ranks[0].model_bytes == quantized.ranks[0].model_bytes
    names = {name for name, found in quantized.ranks[0].tensors.items() if found != taken.ranks[0].tensors[name]}
    assert {name.rpartition(".")[2] for name in names} >= {"w13_weight", "w13_weight_scale", "w2_weight"}


def test_one_pass_writes_the_weights_with_a_scale_of_one(workers, checkpoint_folder):
    job = LoadJob(build(CheckpointSpec("qwen3_moe"), checkpoint_folder), streaming="require")
    quantized, once = workers.load(job).ranks[0].tensors, workers.load(replace(job, quantizing="once")).ranks[0].tensors
    names = {name for name, found in quantized.items() if found != once[name]}
    assert {name.rpartition(".")[2] for name in names} >= {"w13_weight", "w13_weight_scale", "w2_weight"}
    assert not [name for name in names if "norm" in name or "embed" in name]


@pytest.mark.parametrize("part", ABLATIONS)
def test_weights_are_stocks_without_any_part_of_the_cpus_way_of_loading(part, workers, checkpoint):
    path = checkpoint("deepseek_v3")
    assert (
        compare(
            workers.load(LoadJob(path, streaming="0")), workers.load(LoadJob(path, streaming="require", without=part))
        )
        == []
    )


@pytest.mark.parametrize(
    ("asked", "contenders"),
    [
        ([], NAMES),
        (["--scaling"], NAMES),
        (["--overhead"], [*NAMES, INTERCEPTING.name]),
        (["--floor"], [*NAMES, ONE_PASS.name]),
        (["--ablation"], [*NAMES, *(contender.name for contender in ABLATED)]),
    ],
)
def test_command_measures_writes_and_leaves_no_checkpoint_behind(monkeypatch, tmp_path, asked, contenders):
    tiny = Case("tiny", 0.01, CheckpointSpec("qwen3_moe", files=3, seed=77))
    monkeypatch.setenv("STREAMFP8_CACHE", str(tmp_path))
    monkeypatch.setattr(bench_cli, "size_cases", lambda *_: [tiny])
    monkeypatch.setattr(bench_cli, "overhead_case", lambda: tiny)
    monkeypatch.setattr(bench_cli, "scaling_cases", lambda _: {"layers": [tiny]})
    files = {"--json": tmp_path / "bench.json", "--png": tmp_path / "bench.png"}
    arguments = [*asked, "--rounds", "1", *(str(part) for pair in files.items() for part in pair)]
    answer = CliRunner().invoke(bench_cli.main, arguments, catch_exceptions=False)
    assert answer.exit_code == 0
    assert all(name in answer.output for name in contenders)
    assert [case["name"] for case in json.loads(files["--json"].read_text())["cases"]] == ["tiny"]
    assert files["--png"].read_bytes().startswith(PNG)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_command_refuses_sizes_that_are_no_numbers():
    answer = CliRunner().invoke(bench_cli.main, ["--sizes", "big"])
    assert answer.exit_code == 2
    assert "0.5,1,2" in answer.output
