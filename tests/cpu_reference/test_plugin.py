"""When the platform steps in, and that it costs nothing elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from sglang_overlay.cpu_reference import plugin
from sglang_overlay.settings import CPU_REFERENCE_VARIABLE


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of these tests has no accelerator, whatever the one they run on has, and the platform is wanted."""
    monkeypatch.setenv(CPU_REFERENCE_VARIABLE, "1")
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    for name in ("cuda", "xpu", "npu", "musa", "mps"):
        if hasattr(torch, name):
            monkeypatch.setattr(getattr(torch, name), "is_available", lambda: False)


def test_steps_in_without_an_accelerator_where_it_is_asked_for() -> None:
    assert plugin.platform() == "sglang_overlay.cpu_reference.platform:CpuReferencePlatform"


@pytest.mark.parametrize("environ", [{}, {"SGLANG_STREAMFP8": "1"}, {CPU_REFERENCE_VARIABLE: "0"}])
def test_does_not_step_in_by_itself(monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    monkeypatch.delenv(CPU_REFERENCE_VARIABLE)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert plugin.platform() is None


@pytest.mark.every_release
@pytest.mark.parametrize("mode", ["0", "1"])
def test_server_that_has_lost_its_accelerator_fails_as_stock_does(checkpoint: Callable[..., Path], mode: str) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "sglang.launch_server", "--quantization", "fp8", "--model-path"]
    ends = []
    for variables in ({"SGLANG_PLUGINS": "of_nobody"}, {"SGLANG_STREAMFP8": mode}):
        done = subprocess.run(
            [*command, str(checkpoint("qwen3"))],
            env={**plain, **hidden, **variables},
            capture_output=True,
            text=True,
            timeout=120,
            start_new_session=True,
        )
        ends.append((done.returncode, done.stderr.splitlines()[-1]))
    assert ends[0] == ends[1]
    assert "No accelerator" in ends[0][1]


def test_leaves_the_machine_to_sglangs_cpu_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert plugin.platform() is None


def test_cpu_engine_switched_off_is_the_same_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "0")
    assert plugin.platform() is not None


@pytest.mark.parametrize("name", ["cuda", "xpu", "mps"])
def test_leaves_the_machine_to_its_accelerator(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(getattr(torch, name), "is_available", lambda: True)
    assert plugin.platform() is None


def test_entry_points_are_installed() -> None:
    (platform,) = entry_points(group="sglang.srt.platforms", name="streamfp8_cpu")
    (hooks,) = entry_points(group="sglang.srt.plugins", name="streamfp8_cpu_reference")
    assert platform.load() is plugin.platform
    assert hooks.load() is plugin.activate


def test_elsewhere_nothing_is_imported() -> None:
    program = (
        "import os, sys; os.environ['SGLANG_USE_CPU_ENGINE'] = '1'\n"
        "import torch; before = set(sys.modules)\n"
        "from sglang_overlay.cpu_reference import plugin\n"
        "assert plugin.platform() is None; plugin.activate()\n"
        "new = {name for name in set(sys.modules) - before if name.split('.')[0] in ('sglang', 'psutil', 'triton')}\n"
        "assert not new, new\n"
        "own = {name for name in sys.modules if name.startswith('sglang_overlay.cpu_reference.')}\n"
        "assert own == {'sglang_overlay.cpu_reference.plugin'}, own\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
