"""The patches fit the installed SGLang."""

from __future__ import annotations

import importlib

import pytest

from sglang_overlay.cpu_reference.catalogue import TOUCH_POINTS
from sglang_overlay.upstream.releases import installed, supported
from sglang_overlay.upstream.touch_point import State, TouchPoint, inspect_point

OLDEST = supported()[0]


@pytest.mark.parametrize("point", TOUCH_POINTS, ids=lambda point: point.target.rpartition(".")[2])
def test_target_is_as_expected_and_hook_exists(point: TouchPoint) -> None:
    found = inspect_point(point)
    assert found.state in (State.READY, State.ACTIVE) or (found.state is State.ABSENT and installed() == OLDEST)
    module, _, name = point.hook.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


def test_what_streaming_patches_is_left_alone() -> None:
    ours = {point.target.rpartition(".")[2] for point in TOUCH_POINTS}
    assert not ours & {"create_weights", "process_weights_after_loading"}
