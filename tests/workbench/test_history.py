# SPDX-License-Identifier: Apache-2.0
"""Nightly figures are kept as ratios, one line a checkpoint and night."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from workbench.bench.bench import BF16, LAYERS, STOCK, STREAMING
from workbench.bench.history import main

SECONDS = {BF16.name: 2.0, STOCK.name: 4.0, LAYERS.name: 3.0, STREAMING.name: 1.0}
PEAK = {BF16.name: 200, STOCK.name: 220, LAYERS.name: 150, STREAMING.name: 110}


def document(case="qwen3_moe 2 GB sorted", commit="abc1234"):
    runs = [
        {"contender": name, "seconds": SECONDS[name], "cpu_seconds": 1.0, "peak": PEAK[name], "final": 100}
        for name in SECONDS
    ]
    return {
        "commit": commit,
        "versions": {"sglang": "0.5.23"},
        "machine": {"cores": 2},
        "cases": [{"name": case, "runs": runs}],
    }


@pytest.fixture
def history(tmp_path):
    return tmp_path / "nights" / "history.jsonl"


@pytest.fixture
def add(history, tmp_path):
    def command(date, **about):
        file = tmp_path / "bench.json"
        file.write_text(json.dumps(document(**about)))
        return CliRunner().invoke(main, ["add", str(history), str(file), "--date", date], catch_exceptions=False)

    return command


def test_line_holds_ratios_and_what_they_were_measured_on(add, history):
    assert add("2026-11-20").exit_code == 0
    (line,) = map(json.loads, history.read_text().splitlines())
    assert line == {
        "date": "2026-11-20",
        "commit": "abc1234",
        "sglang": "0.5.23",
        "machine": {"cores": 2},
        "case": "qwen3_moe 2 GB sorted",
        "peak_of_model": 1.1,
        "peak_of_stock": 0.5,
        "seconds_of_stock": 0.25,
        "seconds_of_bf16": 0.5,
    }


def test_another_night_or_commit_is_another_line_and_the_same_one_is_replaced(add, history):
    add("2026-11-20")
    add("2026-11-21")
    add("2026-11-21", commit="def5678")
    add("2026-11-21")
    found = [json.loads(line) for line in history.read_text().splitlines()]
    assert [(line["date"], line["commit"]) for line in found] == [
        ("2026-11-20", "abc1234"),
        ("2026-11-21", "def5678"),
        ("2026-11-21", "abc1234"),
    ]


def test_chart_is_drawn_of_several_cases_and_nights(add, history, tmp_path):
    for date in ("2026-11-20", "2026-11-21"):
        add(date)
        add(date, case="deepseek_v3 2 GB sorted")
    chart = tmp_path / "chart.png"
    assert CliRunner().invoke(main, ["chart", str(history), str(chart)], catch_exceptions=False).exit_code == 0
    assert chart.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_broken_line_is_named_and_nothing_is_lost(add, history):
    add("2026-11-20")
    history.write_text(history.read_text() + "{broken\n")
    before = history.read_bytes()
    outcome = add("2026-11-21")
    assert outcome.exit_code == 1
    assert "history.jsonl, line 2, is no JSON" in outcome.output
    assert history.read_bytes() == before
