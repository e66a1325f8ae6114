# SPDX-License-Identifier: Apache-2.0
"""Every touch point fits the installed SGLang, and one that does not is noticed."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest

from sglang_overlay.upstream.catalogue import STREAMING
from sglang_overlay.upstream.touch_point import State, inspect_point


@pytest.mark.parametrize("point", STREAMING, ids=lambda point: point.target.split(".", 4)[-1])
def test_target_is_as_expected_and_hook_exists(point):
    assert inspect_point(point).state in (State.READY, State.ACTIVE)
    module, _, name = point.hook.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("point", STREAMING, ids=lambda point: point.target.split(".", 4)[-1])
def test_entry_says_why_it_is_there_and_when_it_can_go(point):
    assert point.why
    assert point.related
    assert point.remove_when


def test_each_target_is_patched_once():
    targets = [point.target for point in STREAMING]
    assert len(set(targets)) == len(targets)


def test_target_that_is_gone_is_missing():
    found = inspect_point(replace(STREAMING[0], target=f"{STREAMING[0].target}_of_old"))
    assert found.state is State.MISSING
    assert "load_model_of_old" in found.detail


@pytest.mark.parametrize("parameters", [("self", "renamed"), ("model_config", "self")])
def test_signature_that_has_changed_is_noticed_and_shown(parameters):
    found = inspect_point(replace(STREAMING[0], parameters=parameters))
    assert found.state is State.SIGNATURE
    assert f"expected {', '.join(parameters)}; found self, " in found.detail
