"""The patches fit the installed SGLang."""

from __future__ import annotations

import importlib

import pytest
from packaging.version import Version

from sglang_overlay.cpu_reference.catalogue import HOOKS, OWN_METHODS
from sglang_overlay.hooks.hook import Hook, State, inspect_hook
from sglang_overlay.hooks.releases import installed

pytestmark = pytest.mark.every_release

ABSENT = {"sglang.kernels.ops.elementwise.elementwise.fused_gate_sigmoid_mul_add": "0.5.13.post1"}
"""The newest release that has nothing of the kind."""


@pytest.mark.parametrize("point", [*HOOKS, *OWN_METHODS], ids=lambda point: point.target.rpartition(".")[2])
def test_target_is_as_expected_and_hook_exists(point: Hook) -> None:
    found = inspect_hook(point)
    absent = Version(installed() or "0") <= Version(ABSENT.get(point.target, "0"))
    assert found.state in ((State.ABSENT,) if absent else (State.READY, State.ACTIVE)), found.detail
    module, _, name = point.wrapper.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_what_streaming_patches_is_left_alone() -> None:
    ours = {point.target.rpartition(".")[2] for point in HOOKS}
    assert not ours & {"create_weights", "process_weights_after_loading"}
