# SPDX-License-Identifier: Apache-2.0
"""With an SGLang that streams by itself the overlay stands aside, says so once, and does not pretend otherwise."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from workbench.releases import patched

from sglang_overlay.hooks import built_in, releases

PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s: %(message)s")
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.layers.quantization import fp8
from sglang.srt.model_loader import loader
from sglang_overlay.hooks.catalogue import STREAMING
from sglang_overlay.hooks.hook import State, inspect_hooks
print("built in:", loader.load_streaming.__name__)
print("hooks:", [found.hook.target for found in inspect_hooks(STREAMING) if found.state is State.ACTIVE])
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


def test_overlay_hooks_nothing_and_says_so_once(run_patched):
    done = run_patched("-c", PROGRAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"INFO sglang_overlay.hooks.applying: StreamFP8: {built_in.NOTE}.") == 1
    assert "built in: load_streaming" in done.stdout
    assert "hooks: []" in done.stdout


def test_check_says_that_sglang_streams_by_itself(run_patched):
    done = run_patched("-m", "sglang_overlay", "check", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0
    assert found["active"]
    assert found["streaming"] == []
    assert "streams fp8 loads itself" in found["notes"][0]


def test_reports_that_nobody_writes_are_a_warning(run_patched, tmp_path):
    done = run_patched("-c", PROGRAM, SGLANG_STREAMFP8_REPORT=str(tmp_path))
    assert "WARNING sglang_overlay.hooks.applying: StreamFP8: no reports are written" in done.stdout


@pytest.mark.parametrize("setting", ["SGLANG_STREAMFP8_SCHEME=block", "SGLANG_STREAMFP8=require"])
def test_setting_that_only_the_overlay_can_honour_is_refused(setting, run_patched):
    done = run_patched("-c", PROGRAM, **dict([setting.split("=")]))
    assert done.returncode == 1
    assert "hooks:" not in done.stdout
    assert f"sglang-streamfp8: {setting} is set, and {built_in.NOTE}" in done.stderr


def test_check_says_that_what_is_required_is_refused(run_patched):
    found = json.loads(run_patched("-m", "sglang_overlay", "check", "--json", SGLANG_STREAMFP8="require").stdout)
    assert not found["active"]
    assert "SGLANG_STREAMFP8=require is set" in found["problems"][0]


def test_plain_release_is_not_taken_for_one_that_streams():
    assert not built_in.streams_itself()
