"""What the demo makes of two trials, and one run of it with real servers."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from reports import load_report
from rich.console import Console
from workbench.docs import demo
from workbench.docs.demo import Comparison, DemoError, Mode, Subject, Trial
from workbench.loads import serving

from sglang_overlay.observe.memory import MemoryUsage
from sglang_overlay.observe.report import LoadReport


def make_report(mode: Mode, peak: int, seconds: float, final: int = 500_000_000) -> LoadReport:
    samples = ((0.0, 0), (seconds / 2, peak), (seconds, final))
    memory = MemoryUsage(metric="RssAnon", start=10, peak_above_start=peak, end_above_start=final, samples=samples)
    return load_report(mode=mode, seconds=seconds, memory=memory, final_bytes=final)


def make_trial(mode: Mode, peak: int, seconds: float, answer: str = "yes") -> Trial:
    return Trial(mode, answer, (make_report(mode, peak, seconds),))


@pytest.fixture
def comparison() -> Comparison:
    stock, streaming = make_trial("stock", 1_000_000_000, 10.0), make_trial("streaming", 550_000_000, 6.0)
    return Comparison(Subject("m", "models/m"), stock, streaming, Path("memory.png"))


def test_trial_counts_the_worst_of_its_ranks() -> None:
    reports = (make_report("stock", 100, 9.0, final=70), make_report("stock", 300, 4.0, final=50))
    trial = Trial("stock", "", reports)
    assert (trial.peak, trial.seconds, trial.final_bytes) == (300, 9.0, 70)


def test_rows_set_streaming_against_stock_and_the_model(comparison: Comparison) -> None:
    assert demo.rows_of(comparison) == [
        ("m", "stock", "1.00 GB", "2.00", "", "10.0 s", "", ""),
        ("FP8 model: 500 MB", "streaming", "550 MB", "1.10", "0.55", "6.0 s", "0.60", "equal"),
    ]


def test_different_answers_stand_out_everywhere(comparison: Comparison) -> None:
    other = dataclasses.replace(comparison, streaming=make_trial("streaming", 1, 1.0, answer="no"))
    assert "DIFFERENT" in demo.markdown_of([other])
    assert json.loads(demo.facts_of([other]))[0]["answers_equal"] is False
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(demo.table_of([other]))
    assert "DIFFERENT" in console.export_text()


def test_markdown_has_one_cell_for_each_heading(comparison: Comparison) -> None:
    lines = demo.markdown_of([comparison]).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {len(demo.HEADINGS) + 1}


def test_load_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    log.write_text("plugin left out\n")
    launch = serving.Launch((), 1, log)
    demo.check_mode(make_trial("streaming", 1, 1.0), launch)
    stock_in_disguise = Trial("streaming", "", (make_report("streaming", 1, 1.0), make_report("stock", 1, 1.0)))
    with pytest.raises(DemoError, match=r"loaded as stock(.|\n)*plugin left out"):
        demo.check_mode(stock_in_disguise, launch)


def test_both_servers_get_the_users_arguments_and_their_own_switch(tmp_path: Path) -> None:
    subject = Subject("m", "models/m", ("--tp", "2"))
    stock, streaming = (demo.launch_of(subject, mode, tmp_path / mode) for mode in demo.SWITCH)
    for launch in (stock, streaming):
        text = " ".join(launch.command)
        assert "-m sglang.launch_server --model-path models/m" in text
        assert "--quantization fp8" in text
        assert text.endswith("--tp 2")
        assert launch.variables["SGLANG_STREAMFP8_REPORT"] == str(launch.log.parent / "reports")
    assert [launch.variables["SGLANG_STREAMFP8"] for launch in (stock, streaming)] == ["0", "1"]


def test_users_folder_becomes_absolute_and_a_hub_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    with demo.subjects(demo.Screen(), "mine", (), tmp_path) as found:
        assert found == [Subject("mine", str(tmp_path / "mine"))]
    with demo.subjects(demo.Screen(), "somebody/model", (), tmp_path) as found:
        assert found == [Subject("model", "somebody/model")]


@pytest.mark.parametrize("model", ["./missing", "missing/of/mine", "~/missing"])
def test_folder_that_is_not_there_is_said_before_a_server_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DemoError, match=f"no folder {model}"):
        demo.given_subject(model, ())


def test_results_are_written_where_they_can_be_copied_from(comparison: Comparison, tmp_path: Path) -> None:
    demo.publish(demo.Screen(), [comparison], tmp_path)
    assert (tmp_path / "table.md").read_text() == demo.markdown_of([comparison])
    assert json.loads((tmp_path / "results.json").read_text())[0]["streaming"]["peak_bytes"] == 550_000_000


@pytest.mark.parametrize(
    ("stock", "streaming", "less"), [(0.6, 0.6, False), (0.6, 0.58, False), (0.6, 0.5, True), (None, None, False)]
)
def test_streaming_must_be_as_accurate_as_stock(
    comparison: Comparison, stock: float | None, streaming: float | None, less: bool
) -> None:
    other = dataclasses.replace(
        comparison,
        stock=dataclasses.replace(comparison.stock, accuracy=stock),
        streaming=dataclasses.replace(comparison.streaming, accuracy=streaming),
    )
    assert other.is_less_accurate is less
    assert json.loads(demo.facts_of([other]))[0]["streaming"]["accuracy"] == streaming


@pytest.mark.server
def test_command_serves_a_checkpoint_both_ways(checkpoint, tmp_path: Path) -> None:
    """As `ci/demo --model` does it, in the environment that the tests run in."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "workbench.docs.demo",
        "--model",
        str(checkpoint("qwen3")),
        "--out",
        str(tmp_path),
    ]
    path = os.pathsep.join([str(demo.environment.CLONE / "ci"), str(demo.environment.CLONE)])
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (results,) = tmp_path.rglob("results.json")
    (found,) = json.loads(results.read_text())
    assert found["answers_equal"]
    assert found["streaming"]["seconds"] > 0
