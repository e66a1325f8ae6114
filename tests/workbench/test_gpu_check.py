# SPDX-License-Identifier: Apache-2.0
"""The check that needs a GPU: what it does without one, its rehearsal on the CPU, and that what is wrong shows."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from workbench import devices, environment, gpu_check, gpu_steps, load_worker, pieces
from workbench.bench import STREAMING
from workbench.environment import EnvironmentSetupError
from workbench.gpu_check import Options, Step
from workbench.gpu_steps import PROMPTS, RING, Finding, Setting, Variant
from workbench.loads import LoadJob

from sglang_overlay.settings import PINNED_RING_VARIABLE


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "has_nvidia_gpu", lambda: False)


@pytest.fixture
def options(tmp_path):
    return Options(wheels=None, checkpoint_gb=0.01, rounds=1, steps=(), work=tmp_path, device="cpu")


@pytest.fixture
def setting(tmp_path):
    return Setting("cpu", tmp_path, 0.01, 1)


def test_without_a_gpu_everything_counts_as_skipped_and_nothing_runs(no_gpu, tmp_path, capsys):
    assert gpu_check.main(["--work", str(tmp_path / "work")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("SKIPPED")
    assert "none of 8 steps was run" in printed
    assert "passed" not in printed
    assert not (tmp_path / "work").exists()


def test_unknown_step_is_an_error_without_a_gpu_too(no_gpu, capsys):
    with pytest.raises(SystemExit):
        gpu_check.main(["--steps", "identity,speed"])
    assert "no such step: speed" in capsys.readouterr().err


def test_every_step_has_a_time_limit_that_fits_a_call_of_ten_minutes():
    assert list(gpu_check.SECONDS) == list(gpu_steps.STEPS)
    assert max(gpu_check.SECONDS.values()) < 600


def test_each_step_that_fails_is_a_failure_and_those_after_it_run(monkeypatch, options, capsys):
    def run_step(name, python, options):
        verdict = "failed" if name == "identity" else "passed"
        return Step(name, 1.0, ({"what": "a thing", "verdict": verdict, "detail": "", "figures": {}},))

    monkeypatch.setattr(gpu_check, "prepared", lambda _: Path(sys.executable))
    monkeypatch.setattr(gpu_check, "run_step", run_step)
    monkeypatch.setattr(gpu_check, "write_results", lambda *_: None)
    assert gpu_check._check(replace(options, steps=("identity", "graphs"))) == 1
    assert gpu_check._check(replace(options, steps=("graphs",))) == 0
    assert "1 passed, 1 failed, 0 skipped" in capsys.readouterr().out


def stand_in(folder: Path, code: str) -> Path:
    """A program that runs `code`, whatever it is asked, in place of a Python that has the steps."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\nimport sys\nout = sys.argv[sys.argv.index('--out') + 1]\n{code}\n")
    program.chmod(0o755)
    return program


FOUND = {"what": "a thing", "verdict": "passed", "detail": "", "figures": {}}


def test_step_that_dies_has_failed_with_what_it_found_before(options, tmp_path):
    code = f"open(out, 'w').write({json.dumps(FOUND)!r} + chr(10)); print('the reason'); sys.exit(3)"
    step = gpu_check.run_step("graphs", stand_in(tmp_path, code), options)
    assert step.findings[0] == FOUND
    assert step.findings[1]["verdict"] == "failed"
    assert "exit code 3" in step.findings[1]["detail"]
    assert "the reason" in step.findings[1]["detail"]


def test_step_that_hangs_is_ended_with_all_it_started(options, tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check.SECONDS, "graphs", 2)
    marker = tmp_path / "alive"
    child = f"import time\nfor _ in range(600):\n    open({str(marker)!r}, 'a').write('.')\n    time.sleep(0.05)"
    code = f"import subprocess, time; subprocess.Popen([{sys.executable!r}, '-c', {child!r}]); time.sleep(60)"
    step = gpu_check.run_step("graphs", stand_in(tmp_path, code), options)
    assert "not done after 2 s" in step.findings[0]["detail"]
    written = marker.stat().st_size
    time.sleep(0.3)
    assert marker.stat().st_size == written > 0


def test_table_counts_and_shows_all_of_a_failure():
    failure = {**FOUND, "verdict": "failed", "detail": "long " * 50}
    lines = list(gpu_check.table([Step("identity", 2.0, (FOUND, failure)), Step("graphs", 1.0, ())]))
    assert "long " * 50 in lines[1]
    assert lines[-1] == "1 passed, 1 failed, 0 skipped"


def test_wheels_for_another_python_are_refused():
    with pytest.raises(EnvironmentSetupError, match=r"for Python 2\.7"):
        gpu_check.check_machine({"python": "2.7", "torch": "2.11.0", "release": "0.5.17"})


def test_wheels_for_another_torch_are_taken_with_a_note(capsys):
    gpu_check.check_machine({"python": environment.python_tag(), "torch": "0.1", "release": "0.5.17"})
    assert "ci/gpu_wheels --torch" in capsys.readouterr().out


def test_damaged_wheels_are_an_error_before_anything_runs(tmp_path, capsys):
    assert gpu_check.main(["--rehearse", "--wheels", str(tmp_path), "--work", str(tmp_path / "work")]) == 1
    assert pieces.MANIFEST in capsys.readouterr().err


# -- the steps ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def load(monkeypatch, workers):
    """The steps' loads, in the workers that other tests use too."""

    class Shared:
        def __enter__(self):
            return workers

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(Setting, "workers", lambda self: Shared())


def verdicts(found: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.verdict for finding in found}


@pytest.mark.server
def test_identity_is_rehearsed_with_what_a_cpu_can_do(load, setting, monkeypatch):
    monkeypatch.setattr(gpu_steps, "IDENTITY", gpu_steps.IDENTITY[:3])
    assert verdicts(list(gpu_steps.identity(setting))) == {
        "qwen3, scales per channel": "skipped",
        "qwen3, one scale a matrix": "passed",
        "qwen3_moe": "passed",
    }


def test_model_that_differs_from_stock_fails(load, setting, monkeypatch):
    monkeypatch.setattr(gpu_steps, "compare", lambda *_: ["rank 0: a weight: bytes differ"])
    with setting.workers() as workers:
        found = gpu_steps._as_stock(workers, setting, Variant("qwen3", "qwen3"))
    assert (found.verdict, found.detail) == ("failed", "rank 0: a weight: bytes differ")


def test_comparison_of_something_else_than_was_meant_fails(load, setting):
    with setting.workers() as workers:
        per_channel = Variant("q", "qwen3", scales="channel")
        rank = workers.load(LoadJob(setting.tiny("qwen3"), streaming="0", prompts=PROMPTS))
    assert [line[:36] for line in gpu_steps._unexpected(rank, per_channel)] == ["the scales are not one a channel: {'"]
    captured = Variant("q", "qwen3", {"graphs": "captured"})
    assert list(gpu_steps._unexpected(rank, captured)) == ["only 0 steps ran as a CUDA graph"]
    ring = Variant("q", "qwen3", {"environ": RING})
    assert list(gpu_steps._unexpected(rank, ring)) == ["the pinned ring was not used"]


def test_loads_that_fail_are_findings(load, setting):
    broken = Variant("broken", "qwen3", {"environ": {"SGLANG_STREAMFP8_ALLOW_MISSING": "maybe"}})
    with setting.workers() as workers:
        found = gpu_steps._as_stock(workers, setting, broken)
    assert found.verdict == "failed"
    assert "SGLANG_STREAMFP8_ALLOW_MISSING" in found.detail


@pytest.mark.server
def test_updates_are_rehearsed(load, setting):
    with setting.workers() as workers:
        found = list(gpu_steps._updated(workers, setting, "qwen3_moe"))
    assert verdicts(found) == dict.fromkeys(
        [f"qwen3_moe, from {one}" for one in ("disk", "tensor", "bucket")], "passed"
    )


def test_update_that_changes_nothing_or_moves_weights_fails(load, setting):
    with setting.workers() as workers:
        before = workers.load(LoadJob(setting.tiny("qwen3"), prompts=PROMPTS, tokens_of="each"))
        other = setting.tiny("qwen3", seed=1)
        job = LoadJob(
            setting.tiny("qwen3"), prompts=PROMPTS, tokens_of="each", updates=(gpu_steps.Update("disk", other),)
        )
        updated = workers.load(job)
    moved = replace(updated.ranks[0].updates[0], moved=("a.weight",))
    rank = replace(updated.ranks[0], updates=(moved,))
    found = gpu_steps._judged("update", before, replace(updated, ranks=(rank,)), before)
    assert found.verdict == "failed"
    assert "moved: a.weight" in found.detail
    assert "makes no difference" in found.detail
    assert "bytes differ" in found.detail


def test_times_are_of_alternating_runs_and_not_judged_without_a_gpu(load, setting):
    found = list(gpu_steps.load_time(setting))
    assert [finding.verdict for finding in found] == ["passed", "passed", "skipped"]
    assert "the limit of 1.0 is a GPU's" in found[-1].detail


def test_limits_are_held_to_on_a_gpu(setting):
    gpu = replace(setting, device="cuda")
    judged = [gpu_steps._measured(gpu, "peak", "", value, 1.02, {}).verdict for value in (1.02, 1.03)]
    assert judged == ["passed", "failed"]


@pytest.mark.parametrize("step", [gpu_steps.graphs, gpu_steps.ring])
def test_graphs_and_the_ring_are_skipped_without_a_gpu(setting, step):
    assert [finding.verdict for finding in step(setting)] == ["skipped"]


def test_the_ring_is_compared_in_every_variant():
    assert {PINNED_RING_VARIABLE: "1"} == RING
    assert [variant.family for variant in gpu_steps.WITH_RING] == [variant.family for variant in gpu_steps.IDENTITY]
    assert all(variant.job["environ"] == RING for variant in gpu_steps.WITH_RING)


def test_loads_to_a_gpu_ask_for_what_needs_no_other_kernels(monkeypatch):
    asked = {}
    monkeypatch.setattr(load_worker, "ServerArgs", lambda **fields: asked.update(fields))
    monkeypatch.setattr(load_worker.runtime, "with_decode_graphs", lambda batch: {"largest": batch})
    load_worker.server_args_of(LoadJob(Path(), device="cuda", graphs="captured", prompts=PROMPTS))
    assert (asked["device"], asked["attention_backend"], asked["largest"]) == ("cuda", "triton", len(PROMPTS))
    assert devices.start_method("cuda") == "spawn"
    assert devices.start_method("cpu") == "forkserver"


@pytest.mark.server
def test_rehearsal_runs_all_steps_in_processes_of_their_own(tmp_path):
    command = [sys.executable, environment.CLONE / "ci" / "workbench" / "gpu_check.py", "--rehearse"]
    ran = subprocess.run(
        [*command, "--work", tmp_path, "--steps", "environment,graphs,checkpoint,memory"],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 failed" in ran.stdout
    assert {file.name for file in (tmp_path / "results").glob("*.json")} == {
        f"{step}.json" for step in ("environment", "graphs", "checkpoint", "memory")
    }
    memory = json.loads((tmp_path / "results" / "memory.json").read_text())
    streamed = memory["findings"][-1]
    assert streamed["what"] == f"peak of {STREAMING.name}"
    assert streamed["figures"]["peak"] > 0
