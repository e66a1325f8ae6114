# SPDX-License-Identifier: Apache-2.0
"""Every hook fits the installed SGLang, and one that does not is noticed.

What a release has not is written down in releases.json: anything else that is absent is a failure.
"""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
from sglang.srt.model_loader.loader import DefaultModelLoader

from sglang_overlay.hooks import releases
from sglang_overlay.hooks.catalogue import OPTIONS, STREAMING, TELLING
from sglang_overlay.hooks.hook import Place, State, inspect_hook

pytestmark = pytest.mark.every_release
ALL = (*STREAMING, *OPTIONS, *TELLING)


@pytest.mark.parametrize("point", ALL, ids=lambda point: point.target.split(".", 4)[-1])
def test_target_is_as_expected_or_known_to_be_absent(point):
    found = inspect_hook(point)
    expected = (State.ABSENT,) if point.target in releases.absent() else (State.READY, State.ACTIVE)
    assert found.state in expected, found.detail


@pytest.mark.parametrize("hook", sorted({place.wrapper for point in ALL for place in point.candidates}))
def test_hook_exists(hook):
    module, _, name = hook.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("release", releases.facts(), ids=lambda release: release.release)
def test_what_is_absent_is_a_touch_point_that_says_what_is_lost(release):
    losses = {point.target: point.without for point in STREAMING}
    assert all(losses[target] for target in release.absent)


def test_newest_release_has_everything():
    assert releases.facts()[-1].absent == ()


@pytest.mark.parametrize("point", ALL, ids=lambda point: point.target.split(".", 4)[-1])
def test_entry_says_why_it_is_there_and_when_it_can_go(point):
    assert point.why
    assert point.related
    assert point.remove_when


def test_each_target_is_patched_once():
    targets = [point.target for point in ALL]
    assert len(set(targets)) == len(targets)


def test_target_that_is_gone_is_missing():
    found = inspect_hook(replace(STREAMING[0], target=f"{STREAMING[0].target}_of_old"))
    assert found.state is State.MISSING
    assert "load_model_of_old" in found.detail


@pytest.mark.parametrize("parameters", [("self", "renamed"), ("model_config", "self")])
def test_signature_that_has_changed_is_noticed_and_shown(parameters):
    found = inspect_hook(replace(STREAMING[0], parameters=parameters))
    assert found.state is State.SIGNATURE
    assert f"expected {', '.join(parameters)}; found self, " in found.detail


def test_target_that_takes_more_than_its_hook_passes_on_is_noticed(monkeypatch):
    point = STREAMING[0]
    assert inspect_hook(point).state.fits
    monkeypatch.setattr(DefaultModelLoader, "load_model", lambda self, *, model_config, device_config, extra=None: None)
    found = inspect_hook(point)
    assert found.state is State.SIGNATURE
    assert "found self, model_config, device_config, extra, more than its hook passes on" in found.detail


def test_target_of_another_release_is_found_where_that_has_it():
    point = STREAMING[0]
    moved = replace(point, target=f"{point.target}_of_new", elsewhere=(Place(point.target),))
    found = inspect_hook(moved)
    assert (found.hook.target, found.hook.wrapper) == (point.target, point.wrapper)
    assert found.state in (State.READY, State.ACTIVE)


def test_each_place_may_have_a_hook_and_a_signature_of_its_own():
    place = Place(STREAMING[0].target, "os:getcwd", ("self", "renamed"))
    found = inspect_hook(replace(STREAMING[0], target="sglang.srt.nothing.of_the_kind", elsewhere=(place,)))
    assert (found.state, found.hook.wrapper) == (State.SIGNATURE, "os:getcwd")


def test_target_that_streaming_can_do_without_is_absent_and_says_what_is_lost():
    found = inspect_hook(replace(STREAMING[0], target="sglang.srt.nothing.of_the_kind", without="A thing."))
    assert (found.state, found.detail) == (State.ABSENT, "A thing.")
    assert found.state.fits
