# SPDX-License-Identifier: Apache-2.0
"""With an SGLang that has the patch series the overlay streams in its place, and has all that it has elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, LoadWorkers, compare
from workbench.releases import patched

from sglang_overlay.hooks import built_in, releases
from sglang_overlay.observe.report import read_folder
from sglang_overlay.settings import REPORT_VARIABLE, SCHEME_VARIABLE

PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s: %(message)s")
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.quantization import fp8
from sglang.srt.model_loader import loader
from sglang_overlay.hooks.catalogue import SERIES, STREAMING
from sglang_overlay.hooks.hook import State, inspect_hooks
print("built in:", loader.load_streaming.__module__)
states = {found.state for found in inspect_hooks((*SERIES, *STREAMING))} - {State.ABSENT}
print("hooks:", *(state.value for state in states))
"""


@pytest.fixture(scope="module")
def run_patched():
    """Runs Python where SGLang has the patch series, and the overlay is installed too."""
    tree = patched.patched_tree(releases.installed())

    def run(*arguments, **environ):
        path = os.pathsep.join([str(tree / "python"), os.environ.get("PYTHONPATH", "")])
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": path, **environ},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture(scope="module")
def patched_workers(tmp_path_factory):
    """Processes that load where SGLang has the patch series, and the overlay is installed too."""
    path = os.pathsep.join(
        [str(patched.patched_tree(releases.installed()) / "python"), os.environ.get("PYTHONPATH", "")]
    )
    with LoadWorkers(tmp_path_factory.mktemp("logs"), {"PYTHONPATH": path}, "spawn") as workers:
        yield workers


def test_overlay_says_once_that_it_streams_in_its_place(run_patched):
    done = run_patched("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"INFO sglang_overlay.hooks.applying: StreamFP8: {built_in.NOTE}.") == 1
    assert f"built in: {built_in.PACKAGE}.loading\nhooks: active\n" in done.stdout


def test_check_says_that_the_overlay_streams_and_that_nothing_is_untested(run_patched):
    done = run_patched("-m", "sglang_overlay", "check", "--json", SGLANG_STREAMFP8="require")
    found = json.loads(done.stdout)
    assert (done.returncode, found["problems"]) == (0, [])
    assert {line["state"] for line in found["streaming"]} <= {"active", "absent"}
    assert "in its place" in found["notes"][0]
    assert not any("untested" in note for note in found["notes"])


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_required_load_is_the_overlays_and_stocks_to_the_bit(family, patched_workers, workers, checkpoint, tmp_path):
    path = checkpoint(family)
    environ = {REPORT_VARIABLE: str(tmp_path)}
    streamed = patched_workers.load(LoadJob(path, streaming="require", environ=environ, prompts=PROMPTS))
    assert not any(built_in.PACKAGE in line for line in streamed.log)
    assert [report.mode for report in read_folder(tmp_path)] == ["streaming"]
    stock = workers.load(LoadJob(path, streaming="0", prompts=PROMPTS))
    assert compare(stock, streamed) == []


def test_switched_off_both_are(patched_workers, workers, checkpoint):
    path = checkpoint("qwen3_moe")
    off = patched_workers.load(LoadJob(path, streaming="0"))
    assert not any("sglang_overlay" in line or built_in.PACKAGE in line for line in off.log)
    assert compare(workers.load(LoadJob(path, streaming="0")), off) == []


def test_scheme_is_the_overlays(patched_workers, workers, checkpoint):
    job = LoadJob(checkpoint("qwen3_moe"), streaming="require", environ={SCHEME_VARIABLE: "channel"})
    assert compare(workers.load(job), patched_workers.load(job)) == []


def test_plain_release_is_not_taken_for_one_that_streams():
    assert not built_in.streams_itself()
