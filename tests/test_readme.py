# SPDX-License-Identifier: Apache-2.0
"""Every command that README and the first pages of docs/ show: run here, or tied to the test that runs it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from harness.forked_python import environ_with
from reports import load_report
from workbench.releases import patched, series

from sglang_overlay.observe.memory import MemoryUsage
from sglang_overlay.observe.report import StagingUsage, UnitCounts, summary_line, write
from sglang_overlay.offline.simulation import FIRST_RELEASE, can_simulate

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/index.md",
    "docs/use.md",
    *(f"docs/questions/{file.name}" for file in sorted((ROOT / "docs" / "questions").glob("*.md"))),
)
OUTPUT = ("StreamFP8: ", "Quantizing weights to FP8: ")
"""How lines of code blocks begin that are no commands."""

ELSEWHERE = {
    "pip install": "tests/test_packaging.py::test_wheel_installs_and_its_command_runs",
    "python -m sglang.launch_server": "tests/load/test_server.py::test_server_streams_and_answers",
    "SGLANG_STREAMFP8_REPORT=": "tests/load/test_server.py::test_server_streams_and_answers",
    "SGLANG_STREAMFP8=0": "tests/hooks/test_plugin.py::test_switch_puts_the_hooks_in_place_or_leaves_sglang_alone",
    "SGLANG_STREAMFP8=require": "tests/load/test_server.py::test_server_streams_and_answers",
    "SGLANG_STREAMFP8_CPU_REFERENCE=": "tests/workbench/test_demo.py::test_command_serves_a_checkpoint_both_ways",
    "SGLANG_STREAMFP8_SCHEME=": "tests/schemes/test_schemes.py::"
    "test_block_is_what_stock_has_after_loading_a_block_fp8_checkpoint",
    "python -m sglang_overlay compare URL": "tests/update/test_replicas.py::"
    "test_server_tells_what_became_of_each_update_and_what_it_serves_then",
    "python -m sglang_overlay run": "tests/hooks/test_launch.py::test_one_batch_benchmark_streams",
    "ray job submit": "tests/hooks/test_ray_actors.py::test_actors_stream_with_the_setup_hook",
    "ci/container/install": "tests/test_container.py::"
    "test_dockerfiles_step_installs_the_package_where_sglang_streams_with_it",
    "curl localhost:30000/update_weights_from_disk": "tests/update/test_update_serving.py::"
    "test_server_is_updated_from_disk_and_back_by_broadcast",
    "curl": "tests/update/test_update_live.py::test_last_tensor_of_a_session_has_the_wrong_shape",
    "docker build": "tests/test_container.py::test_dockerfiles_step_installs_the_package_where_sglang_streams_with_it",
    "kubectl apply": "tests/test_container.py::test_sglang_knows_the_pods_arguments_and_serves_where_the_pod_is_asked",
    "kubectl exec": "tests/test_cli.py::test_command_runs_as_a_module_and_piped_output_has_no_colour",
    "kubectl logs": "tests/test_cli.py::test_check_says_no_without_an_accelerator_and_how_to_try_it_all_the_same",
    "ci/baseline": ".github/workflows/nightly.yml",
    "ci/bench": "tests/workbench/test_bench.py::test_command_measures_writes_and_leaves_no_checkpoint_behind",
    "ci/compare": "tests/workbench/test_compare.py::test_streaming_is_compared_with_stock",
    "ci/demo": "tests/workbench/test_demo.py::test_command_serves_a_checkpoint_both_ways",
    "ci/gpu_check": "tests/workbench/test_gpu_check.py::test_rehearsal_runs_steps_one_after_another",
    "ci/gpu_wheels": "tests/workbench/test_gpu_wheels.py::test_what_is_collected_is_packed_with_what_it_is_for",
    "ci/peaks": "tests/workbench/test_peaks.py::test_tables_are_those_of_the_stored_series_and_figures",
    "ci/plans": "tests/offline/plan/test_baselines.py::test_the_pages_show_the_newest_releases_baselines",
    "ci/docs": ".github/workflows/pull-request.yml",
    "ci/test": ".ci/run",
}
"""What is too heavy to be run here, by how it begins, and the test or script that runs it."""

SIZES = (("hidden_size", 256), ("intermediate_size", 1024), ("num_attention_heads", 8), ("num_key_value_heads", 8))
"""What can be cut into blocks of 128, and into 8 ranks."""


def code_lines(page: str) -> list[str]:
    """Lines of a page's code blocks, which are indented."""
    blocks = re.findall(r"(?:^\n|\A)((?:^    .+\n)+)", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines()]


def commands() -> list[str]:
    """Each command once, those in the text included."""
    text = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    inline = re.findall(r"(?<!`)`((?:python -m|pip|ci/\w)[^`\n]*)`(?!`)", text)
    shown = [line for page in PAGES for line in code_lines(page) if not line.startswith(OUTPUT)]
    return list(dict.fromkeys([*shown, *inline]))


def parts_of(command: str) -> list[str]:
    """Settings of a command and the command itself."""
    settings = re.match(r"(?:[A-Z_0-9]+=\S* )*", command)[0]
    return [*settings.split(), command.removeprefix(settings)]


def is_light(command: str) -> bool:
    return command.startswith("python -m sglang_overlay ") and runner_of(command) is None


def runner_of(part: str) -> str | None:
    return next((runner for start, runner in ELSEWHERE.items() if begins(part, start)), None)


def begins(part: str, start: str) -> bool:
    """Whether these are the first words of a command, or a setting of that name."""
    return part.startswith(start) and (start.endswith("=") or part[len(start) : len(start) + 1] in ("", " "))


def runs(runner: str, start: str) -> bool:
    """Whether a test of that name exists, or a script has a line or a step with the command."""
    file, _, test = runner.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    pattern = rf"^def {test}\(" if test else rf"^\s*(- )?(run: )?{re.escape(start)}\b"
    return re.search(pattern, text, flags=re.MULTILINE) is not None


@pytest.mark.parametrize("command", [command for command in commands() if not is_light(command)])
def test_heavy_command_is_run_elsewhere(command):
    unknown = [part for part in parts_of(command) if runner_of(part) is None]
    assert not unknown, f"no test is known to run {unknown}: enter one in ELSEWHERE"


@pytest.mark.parametrize("start", ELSEWHERE)
def test_what_runs_a_heavy_command_is_there(start):
    assert runs(ELSEWHERE[start], start)


@pytest.fixture
def places(checkpoint, tmp_path):
    """What stands for the placeholders in commands. Folders of reports are where commands expect them."""
    memory = MemoryUsage("RssAnon", 0, 9, 5, ((0.0, 0),))
    load = load_report(mode="stock", seconds=2.0, memory=memory, final_bytes=5)
    for name, mode in (("stock", "stock"), ("reports", "streaming")):
        write(replace(load, mode=mode), tmp_path / name)
    for path, text in series.touched(patched.installed()).items():
        file = tmp_path / "sglang" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    model = checkpoint("qwen3", overrides=SIZES)
    return {
        "<bf16 checkpoint>": model,
        "<folder or config.json>": model,
        "<folder of reports>": "reports",
        "<new folder>": "exported",
        "<tree of SGLang>": "sglang",
    }


@pytest.mark.parametrize("command", [command for command in commands() if is_light(command)])
def test_light_command_runs(command, places, tmp_path):
    if re.search(r" (plan|export) ", command) and not can_simulate():
        pytest.skip(f"needs SGLang {FIRST_RELEASE} or newer")
    for placeholder, value in places.items():
        command = command.replace(placeholder, shlex.quote(str(value)))
    assert "<" not in command, "a placeholder that `places` does not know"
    before = set(tmp_path.rglob("*"))
    done = run(command, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in re.findall(r"--(?:png|html|out) (\S+)", command):
        assert (tmp_path / name) in set(tmp_path.rglob("*")) - before


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user types it, with this Python."""
    _, *arguments = shlex.split(command)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environ_with(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("page", ["README.md", "docs/use.md"])
def test_line_of_the_log_is_as_it_is_logged(page):
    (shown,) = [line for line in code_lines(page) if re.match(r"StreamFP8: \d", line)]
    usage = MemoryUsage("RssAnon", 0, 589_000_000, 0, ((0.0, 0),))
    units, staging = UnitCounts(670, 600), StagingUsage(0)
    logged = summary_line(
        load_report(mode="streaming", seconds=4.6, memory=usage, final_bytes=547_000_000, units=units, staging=staging)
    )
    assert shape(shown) == shape(logged)


def test_counts_of_architectures_are_those_of_the_sweep():
    counted = re.search(r"^\d+ architectures, .*$", (ROOT / "docs" / "families.md").read_text(), re.MULTILINE)[0]
    shown = re.search(r"\[(\d+ architectures)\].*: (.*?), none differs", (ROOT / "README.md").read_text())
    parts = [shown[1], *(re.sub(r" \(.*", "", part, flags=re.DOTALL) for part in re.split(r",\s+", shown[2]))]
    assert len(parts) == 6
    assert [part for part in parts if not re.search(rf"\b{part}\b", counted)] == []


def shape(line: str) -> str:
    """A line without its numbers."""
    return re.sub(r"[\d.]+", "0", line).replace("layers", "layer")
