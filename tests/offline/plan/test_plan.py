# SPDX-License-Identifier: Apache-2.0
"""The command: its verdict, its table, its JSON and its chart."""

from __future__ import annotations

import json

import jsonschema
import pytest
from click.testing import CliRunner
from workbench.bench.plans import CONFIGS

from sglang_overlay.cli import main
from sglang_overlay.observe import terminal
from sglang_overlay.offline.plan import document, gpus, table, timeline
from sglang_overlay.offline.plan.gpus import GPU
from sglang_overlay.offline.plan.job import MODES, Layout
from sglang_overlay.offline.plan.planner import Request
from sglang_overlay.settings import SCHEME_VARIABLE


@pytest.fixture(scope="module")
def plan(checkpoint, planned):
    return planned(Request(checkpoint("qwen3_moe", files=3), Layout(tp=2, pp=2)))


def test_one_rank_of_each_stage_stands_for_its_stage(plan):
    assert [(rank.rank, rank.stands_for) for rank in plan.ranks] == [(0, (0, 1)), (2, (2, 3))]


def test_equal_ranks_are_equal(checkpoint, planned):
    request = Request(checkpoint("qwen3_moe"), Layout(tp=2), modes=("streaming",), every_rank=True)
    first, second = (rank.loads[0] for rank in planned(request).ranks)
    assert (first.peak, first.final, first.samples) == (second.peak, second.final, second.samples)


@pytest.mark.parametrize("model", ["GLM-5", "Qwen3-Next-80B-A3B"])
def test_a_model_that_asks_for_a_gpu_while_it_is_built_is_planned_without_one(model, planned, tmp_path):
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "num_experts": 8}))
    load = planned(Request(tmp_path, modes=("streaming",))).highest("streaming")
    assert (load.streamed > 0, load.fallback) == (True, 0)


def test_a_plan_fits_where_every_ranks_peak_does(plan):
    highest = plan.highest("streaming").peak
    assert plan.fits("streaming", GPU("enough", 2 * highest, highest, (9, 0)))
    assert not plan.fits("streaming", GPU("too small", 2 * highest, highest - 1, (9, 0)))


def test_json_is_what_its_schema_says(plan):
    schema = json.loads(document.SCHEMA_FILE.read_text())
    for gpu in (None, gpus.find("h200")):
        data = json.loads(json.dumps(document.to_json(plan, gpu)))
        jsonschema.validate(data, schema, jsonschema.Draft202012Validator)
    assert data["gpu"]["fits"] == dict.fromkeys(MODES, True)
    load = data["ranks"][0]["loads"]["streaming"]
    assert load["peak_bytes"] == max(held for _, held in load["samples"])


def test_the_table_has_a_row_for_each_rank_and_mode(plan, capsys):
    table.print_plan(terminal.console(), plan, gpus.find("H200"))
    text = capsys.readouterr().out
    assert [line.split()[0] for line in text.splitlines() if " streaming " in line and "x" in line] == ["0-1", "2-3"]
    assert "no KV cache" in text
    assert "streaming loads" in text


def test_the_chart_is_written(plan, tmp_path):
    pytest.importorskip("matplotlib")
    assert timeline.draw(plan, tmp_path / "plan.png", "a title", gpus.find("H200")).stat().st_size > 10_000


def _run(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


@pytest.mark.parametrize(("scheme", "message"), [("blok", "there is no quantization scheme"), ("{", "no valid JSON")])
def test_a_scheme_that_is_none_is_exit_code_2(scheme, message, monkeypatch):
    monkeypatch.setenv(SCHEME_VARIABLE, scheme)
    result = _run("--model-path", CONFIGS / "DeepSeek-V3.json")
    assert result.exit_code == 2
    assert message in result.output


@pytest.mark.usefixtures("planned_here")
def test_what_does_not_fit_is_exit_code_1():
    result = _run("--model-path", CONFIGS / "DeepSeek-V2-Lite.json", "--mode", "stock", "--gpu", "L4")
    assert result.exit_code == 1, result.output
    assert "does not load" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-path", "/nowhere"], "/nowhere is not there"),
        (["--model-path", CONFIGS / "DeepSeek-V3.json", "--gpu", "H999"], "known: L4, "),
        (["--model-path", CONFIGS / "README.md"], "no model's config.json"),
        (["--model-path", CONFIGS / "DeepSeek-V3.json", "--tp", "8", "--ep", "3"], "do not divide into 3 EP ranks"),
        (["--model-path", CONFIGS / "DeepSeek-V3.json", "--tp", "0"], "0 is not in the range x>=1"),
    ],
)
def test_what_cannot_be_planned_is_exit_code_2(arguments, message):
    result = _run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
