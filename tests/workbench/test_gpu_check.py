# SPDX-License-Identifier: Apache-2.0
"""The check that needs a GPU: what it does without one, its rehearsal on the CPU, and that what is wrong shows."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from workbench.bench.bench import STREAMING
from workbench.gpu import gpu_check, gpu_steps, pieces
from workbench.gpu.gpu_check import Interpreter, Options
from workbench.gpu.gpu_steps import PROMPTS, RING, Finding, Findings, Setting, ThisProcess, TimeIsUp, Variant
from workbench.loads import devices, load_worker
from workbench.loads.checkpoints import CheckpointSpec, build
from workbench.loads.job import LoadJob
from workbench.releases import environment
from workbench.releases.environment import EnvironmentSetupError

from sglang_overlay.settings import PINNED_RING_VARIABLE


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(environment, "has_nvidia_gpu", lambda: False)


@pytest.fixture
def options(tmp_path):
    return Options(
        wheels=None,
        checkpoint_gb=0.01,
        rounds=1,
        steps=("identity", "graphs", "memory"),
        seconds=60,
        work=tmp_path,
        results=tmp_path / "results",
        device="cpu",
    )


@pytest.fixture
def setting(tmp_path, workers):
    """A rehearsal with small steps, whose loads are made where other tests' are."""
    return Setting("cpu", tmp_path, 0.01, 1, workers)


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


def test_steps_are_known_before_anything_is_installed():
    assert list(gpu_check.STEPS) == list(gpu_steps.STEPS)


@pytest.mark.parametrize("program", ["gpu_check", "gpu_wheels"])
def test_a_python_that_has_nothing_installed_runs_it(program):
    file = Path(gpu_check.__file__).with_name(f"{program}.py")
    done = subprocess.run([sys.executable, "-I", "-S", str(file), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -- the processes -----------------------------------------------------------------------------------------------------


def stand_in(folder: Path, code: str) -> Interpreter:
    """A program that runs `code`, whatever it is asked, in place of a Python that has the steps."""
    program = folder / "python"
    begin = (
        "import json, os, sys, time\n"
        "arguments = sys.argv[sys.argv.index('workbench.gpu.gpu_steps') + 1:]\n"
        "steps = arguments[:arguments.index('--device')]\n"
        "out = open(arguments[arguments.index('--out') + 1], 'a')\n"
        "def write(step, verdict):\n"
        "    line = dict(step=step, what=step, verdict=verdict, detail='', figures={})\n"
        "    print(json.dumps(line), file=out, flush=True)\n"
    )
    program.write_text(f"#!{sys.executable}\n{begin}{code}\n")
    program.chmod(0o755)
    return Interpreter(program, {})


def found(lines):
    return [(line["step"], line["verdict"]) for line in lines]


def test_step_at_which_the_process_dies_has_failed_and_another_runs_those_after_it(options, tmp_path):
    code = (
        "for step in steps:\n"
        "    write(step, 'begun')\n"
        "    write(step, 'passed')\n"
        "    if step == 'identity':\n"
        "        os._exit(3)"
    )
    lines = gpu_check.run_steps(stand_in(tmp_path, code), options)
    expected = [("identity", "passed"), ("identity", "failed"), ("graphs", "passed"), ("memory", "passed")]
    assert found(lines) == expected
    assert "exit code 3" in lines[1]["detail"]


def test_a_process_that_cannot_even_begin_fails_each_step_with_its_log(options, tmp_path):
    code = "open(arguments[arguments.index('--log') + 1], 'a').write('the reason\\n'); sys.exit(1)"
    lines = gpu_check.run_steps(stand_in(tmp_path, code), options)
    assert found(lines) == [(step, "failed") for step in options.steps]
    assert "the reason" in lines[0]["detail"]


def test_what_hangs_is_ended_with_all_it_started_and_the_rest_is_skipped_by_name(options, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_GRACE_SECONDS", 1)
    marker = tmp_path / "alive"
    child = f"import time\nfor _ in range(600):\n    open({str(marker)!r}, 'a').write('.')\n    time.sleep(0.05)"
    code = (
        "write('graphs', 'begun')\n"
        f"import subprocess; subprocess.Popen([{sys.executable!r}, '-c', {child!r}])\n"
        "time.sleep(60)"
    )
    lines = gpu_check.run_steps(stand_in(tmp_path, code), replace(options, seconds=1))
    assert found(lines) == [("graphs", "failed"), ("memory", "skipped")]
    written = marker.stat().st_size
    time.sleep(0.3)
    assert marker.stat().st_size == written > 0


def test_findings_of_an_earlier_call_do_not_count(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "prepared", lambda _: stand_in(tmp_path, "write(steps[0], 'passed')"))
    options.findings.parent.mkdir()
    options.findings.write_text(json.dumps({"step": "identity", "verdict": "failed"}) + "\n")
    assert gpu_check._check(options) == 0
    assert "1 passed, 0 failed, 0 skipped" in capsys.readouterr().out


@pytest.mark.parametrize("code", ["write(steps[0], 'failed')", ""])
def test_a_failure_and_nothing_at_all_are_told_by_the_exit_code(options, tmp_path, monkeypatch, code):
    monkeypatch.setattr(gpu_check, "prepared", lambda _: stand_in(tmp_path, code))
    assert gpu_check._check(options) == 1


def test_wheels_for_another_python_are_refused():
    with pytest.raises(EnvironmentSetupError, match=r"for Python 2\.7"):
        gpu_check.check_machine({"python": "2.7", "torch": "2.11.0", "release": "0.5.17"})


def test_wheels_for_another_torch_are_taken_with_a_note(capsys):
    gpu_check.check_machine({"python": environment.python_tag(), "torch": "0.1", "release": "0.5.17"})
    assert "ci/gpu_wheels --torch" in capsys.readouterr().out


def test_damaged_wheels_are_an_error_before_anything_runs(tmp_path, capsys):
    assert gpu_check.main(["--rehearse", "--wheels", str(tmp_path), "--work", str(tmp_path / "work")]) == 1
    assert pieces.MANIFEST in capsys.readouterr().err


def test_out_of_wheels_sglang_comes_first_and_finds_this_package_in_the_clone(options, tmp_path):
    folder, wheels = tmp_path / "folder", tmp_path / "wheels"
    (folder / "site").mkdir(parents=True)
    (folder / "site" / "carried.py").write_text("")
    wheels.mkdir()
    facts = {"python": environment.python_tag(), "torch": torch.__version__.partition("+")[0], "release": "0.5.17"}
    pieces.pack(folder, wheels, 10_000, **facts)
    interpreter = gpu_check.prepared(replace(options, wheels=wheels))
    question = (
        "import carried, importlib.metadata as m, sglang_overlay, workbench;"
        "print(carried.__file__, sglang_overlay.__file__,"
        " *(p.name for p in m.entry_points(group='sglang.srt.plugins')))"
    )
    command = [interpreter.python, "-P", "-c", question]
    printed = subprocess.run(
        command, env={**os.environ, **interpreter.variables}, capture_output=True, text=True, check=True
    ).stdout
    assert str(options.work / "unpacked" / "site" / "carried.py") in printed
    assert str(environment.CLONE / "sglang_overlay") in printed
    assert "streamfp8" in printed
    assert gpu_check.prepared(replace(options, wheels=wheels)) == interpreter


# -- the steps in one process ------------------------------------------------------------------------------------------


@pytest.fixture
def run_steps(monkeypatch, setting):
    """Runs steps of the test's own; exit code, findings and what was printed."""

    def run(**steps):
        monkeypatch.setattr(gpu_steps, "STEPS", steps)
        out, shown = io.StringIO(), io.StringIO()
        code = gpu_steps.run(list(steps), setting, Findings(out, shown))
        return code, [json.loads(line) for line in out.getvalue().splitlines()], shown.getvalue()

    return run


def passing(_):
    yield Finding("a thing", "passed", "well")


def raising(_):
    yield Finding("a thing", "passed")
    raise RuntimeError("the reason")


def late(_):
    yield Finding("a thing", "passed")
    raise TimeIsUp


def test_a_step_that_raises_has_failed_and_those_after_it_run(run_steps):
    code, lines, shown = run_steps(first=raising, second=passing)
    steps = [(line["step"], line["verdict"]) for line in lines]
    assert steps == [
        ("first", "begun"),
        ("first", "passed"),
        ("first", "failed"),
        ("second", "begun"),
        ("second", "passed"),
    ]
    assert "the reason" in lines[2]["detail"]
    assert code == 0
    assert "PASSED   second       a thing" in shown


def test_what_there_is_no_time_for_is_skipped_by_name(run_steps):
    code, lines, _ = run_steps(first=late, second=late)
    assert [(line["step"], line["what"]) for line in lines if line["verdict"] == "skipped"] == [
        ("first", "the rest of it"),
        ("second", "the rest of it"),
    ]
    assert code == 0


def test_no_load_begins_when_the_time_is_up(tmp_path):
    with pytest.raises(TimeIsUp):
        ThisProcess(tmp_path, time.monotonic() - 1).load(LoadJob(tmp_path))


def test_a_device_that_answers_no_more_leaves_the_rest_to_another_process(run_steps, monkeypatch):
    monkeypatch.setattr(devices.Accelerator, "answers", lambda self: False)
    code, lines, _ = run_steps(first=raising, second=passing)
    assert code == gpu_steps.BROKEN
    assert {line["step"] for line in lines} == {"first"}


# -- what the steps find -----------------------------------------------------------------------------------------------


def verdicts(found: list[Finding]) -> dict[str, str]:
    return {finding.what: finding.verdict for finding in found}


@pytest.mark.server
def test_identity_is_rehearsed_with_what_a_cpu_can_do(setting, monkeypatch):
    monkeypatch.setattr(gpu_steps, "IDENTITY", gpu_steps.IDENTITY[:3])
    assert verdicts(list(gpu_steps.identity(setting))) == {
        "qwen3, scales per channel": "skipped",
        "qwen3, one scale a matrix": "passed",
        "qwen3_moe": "passed",
    }


def test_some_rows_of_what_is_compared_per_channel_are_zeros(tmp_path):
    plain = build(CheckpointSpec("qwen3", overrides=(("num_hidden_layers", 1),)), tmp_path)
    for _ in range(2):
        edited = gpu_steps.with_zero_rows(plain, ["gate_proj"])
    before, after = (load_file(folder / "model.safetensors") for folder in (plain, edited))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.0.mlp.gate_proj.weight"]
    assert int((after[changed[0]] == 0).all(dim=1).sum()) == 37


def test_rows_are_on_both_sides_of_where_sglang_changes_its_kernel():
    (channel,) = (variant for variant in gpu_steps.IDENTITY if variant.scales == "channel")
    threshold = 16 * 132
    assert channel.overrides["intermediate_size"] < threshold < 2 * channel.overrides["intermediate_size"]


def test_model_that_differs_from_stock_fails(setting, monkeypatch):
    monkeypatch.setattr(gpu_steps, "compare", lambda *_: ["rank 0: a weight: bytes differ"])
    finding = gpu_steps._as_stock(setting, Variant("qwen3", "qwen3"))
    assert (finding.verdict, finding.detail) == ("failed", "rank 0: a weight: bytes differ")


def test_comparison_of_something_else_than_was_meant_fails(setting):
    per_channel = Variant("q", "qwen3", scales="channel")
    rank = setting.loads.load(LoadJob(setting.tiny("qwen3"), streaming="0", prompts=PROMPTS))
    assert [line[:36] for line in gpu_steps._unexpected(rank, per_channel)] == ["the scales are not one a channel: {'"]
    captured = Variant("q", "qwen3", {"graphs": "captured"})
    assert list(gpu_steps._unexpected(rank, captured)) == ["only 0 steps ran as a CUDA graph"]
    ring = Variant("q", "qwen3", {"environ": RING})
    assert list(gpu_steps._unexpected(rank, ring)) == ["the pinned ring was not used"]


def test_loads_that_fail_are_findings(setting):
    broken = Variant("broken", "qwen3", {"environ": {"SGLANG_STREAMFP8_ALLOW_MISSING": "maybe"}})
    finding = gpu_steps._as_stock(setting, broken)
    assert finding.verdict == "failed"
    assert "SGLANG_STREAMFP8_ALLOW_MISSING" in finding.detail


@pytest.mark.parametrize("scheme", ["stock", "int8"])
def test_cost_of_a_unit_is_measured_in_every_scheme(setting, scheme):
    finding = gpu_steps._unit_cost(setting, scheme)
    assert (finding.what, finding.verdict) == (f"an expert, scheme {scheme}", "passed")
    assert finding.figures["seconds"] > 0


@pytest.mark.server
def test_updates_are_rehearsed(setting):
    assert verdicts(list(gpu_steps._updated(setting, "qwen3_moe"))) == dict.fromkeys(
        [f"qwen3_moe, from {one}" for one in ("disk", "tensor", "bucket")], "passed"
    )


def test_update_that_changes_nothing_or_moves_weights_fails(setting):
    before = setting.loads.load(LoadJob(setting.tiny("qwen3"), prompts=PROMPTS, tokens_of="each"))
    other = setting.tiny("qwen3", seed=1)
    job = LoadJob(setting.tiny("qwen3"), prompts=PROMPTS, tokens_of="each", updates=(gpu_steps.Update("disk", other),))
    updated = setting.loads.load(job)
    moved = replace(updated.ranks[0].updates[0], moved=("a.weight",))
    rank = replace(updated.ranks[0], updates=(moved,))
    finding = gpu_steps._judged("update", before, replace(updated, ranks=(rank,)), before)
    assert finding.verdict == "failed"
    assert "moved: a.weight" in finding.detail
    assert "makes no difference" in finding.detail
    assert "bytes differ" in finding.detail


def test_times_are_of_alternating_runs_and_not_judged_without_a_gpu(setting):
    found = list(gpu_steps.load_time(setting))
    assert [finding.verdict for finding in found] == ["passed", "passed", "skipped"]
    assert "x stock fp8" in found[-1].detail
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
    families = [variant.family for variant in gpu_steps.WITH_RING]
    assert families == [*(variant.family for variant in gpu_steps.IDENTITY), "deepseek_v3"]
    assert all(variant.job["environ"] == RING for variant in gpu_steps.WITH_RING)


def test_loads_to_a_gpu_ask_for_what_needs_no_other_kernels(monkeypatch):
    asked = {}
    monkeypatch.setattr(load_worker, "ServerArgs", lambda **fields: asked.update(fields))
    monkeypatch.setattr(load_worker.runtime, "with_decode_graphs", lambda batch: {"largest": batch})
    load_worker.server_args_of(LoadJob(Path(), device="cuda", graphs="captured", prompts=PROMPTS))
    assert (asked["device"], asked["attention_backend"], asked["largest"]) == ("cuda", "triton", len(PROMPTS))
    assert devices.start_method("cuda") == "spawn"
    assert devices.start_method("cpu") == "forkserver"


def test_without_flashinfer_sglang_finds_the_names_it_asks_for_and_sgl_kernel_its_own_norms():
    code = (
        "from workbench.loads import devices; devices.prepare('cuda')\n"
        "from flashinfer import bmm_fp8\n"
        "from flashinfer.sampling import min_p_sampling_from_probs\n"
        "assert bmm_fp8 is devices.bmm_fp8\n"
        "try:\n    import flashinfer.norm\n"
        "except ImportError:\n    print('no norms')"
    )
    path = os.pathsep.join([str(environment.CLONE / "ci"), *sys.path])
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert ran.stdout == "no norms\n"


def test_product_of_fp8_matrices_is_the_scaled_product_of_their_values():
    torch.manual_seed(0)
    a, b = (torch.randn(2, 16, 16).to(torch.float8_e4m3fn) for _ in range(2))
    out = torch.empty(2, 16, 16, dtype=torch.bfloat16)
    devices.bmm_fp8(a, b, torch.tensor([2.0]), torch.tensor([0.25]), torch.bfloat16, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double() * 0.5, rtol=2**-7, atol=2**-6)


@pytest.mark.server
def test_rehearsal_runs_steps_one_after_another(tmp_path):
    command = [sys.executable, environment.CLONE / "ci" / "workbench" / "gpu" / "gpu_check.py", "--rehearse"]
    ran = subprocess.run(
        [*command, "--work", tmp_path, "--steps", "environment,graphs,memory"],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "0 failed" in ran.stdout
    lines = [json.loads(line) for line in (tmp_path / "results" / gpu_check.FINDINGS).read_text().splitlines()]
    assert [line["step"] for line in lines if line["verdict"] == "begun"] == ["environment", "graphs", "memory"]
    assert lines[-1]["what"] == f"deepseek_v3, peak of {STREAMING.name}"
    assert lines[-1]["figures"]["peak"] > 0
