"""When the platform steps in, and that it costs nothing elsewhere."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from sglang_overlay.cpu_reference import plugin


@pytest.fixture(autouse=True)
def plain_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of these tests has no accelerator, whatever the one they run on has."""
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    for name in ("cuda", "xpu", "npu", "musa", "mps"):
        if hasattr(torch, name):
            monkeypatch.setattr(getattr(torch, name), "is_available", lambda: False)


def test_steps_in_without_an_accelerator() -> None:
    assert plugin.platform() == "sglang_overlay.cpu_reference.platform:CpuReferencePlatform"


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
