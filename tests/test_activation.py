"""What stands in the way, found without importing SGLang; tests/test_cli.py runs the whole check."""

import sys

import pytest

from sglang_overlay import activation
from sglang_overlay.activation import Activation, HookLine, to_json
from sglang_overlay.hooks import releases


def _hook(state: str, detail: str = "") -> HookLine:
    return HookLine("sglang.thing", "around", state, detail, "a reason", (), "it is fixed")


def _activation(problems: tuple[str, ...]) -> Activation:
    return Activation("0.5.23", ("0.5.23",), "1", None, (_hook("active"),), (), (), (), problems, ())


def test_installed_and_listed_plugin_is_no_problem():
    assert activation._installation_problems({"SGLANG_PLUGINS": "other, streamfp8"}) == []


@pytest.mark.parametrize("process", ["--use-ray", "one_batch", "--encoder-only"])
def test_processes_that_load_no_plugins_are_named(process):
    found = activation.to_json(_activation(()))
    assert process in " ".join(found["notes"])
    assert "python -m sglang_overlay run" in " ".join(found["notes"])


def test_platform_that_keeps_the_plugin_away_is_seen():
    assert activation._installation_problems({"SGLANG_PLATFORM": "streamfp8_cpu"}) == []
    (problem,) = activation._installation_problems({"SGLANG_PLATFORM": "other"})
    assert "SGLANG_PLATFORM=other leaves 'streamfp8' out" in problem


def test_unsupported_release_is_named_with_those_supported(monkeypatch):
    monkeypatch.setattr(releases, "installed", lambda: "0.4.0")
    [problem] = activation._installation_problems({})
    assert "0.4.0" in problem
    assert releases.supported()[-1] in problem
    assert "newer sglang-streamfp8" in problem


def test_missing_entry_point_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(activation, "PLUGIN_NAME", "not-installed")
    [problem] = activation._installation_problems({})
    assert f"{sys.executable} -m pip install ." in problem


def test_mismatched_signature_is_shown_with_what_was_found():
    hooks = [_hook("active"), _hook("signature", "expected self, layer; found self")]
    [problem] = activation._hook_problems(hooks, [])
    assert problem == "1 of 2 hooks are not applied; sglang.thing: signature, expected self, layer; found self"


def test_plugin_that_raised_is_the_cause_given_for_idle_hooks():
    [problem] = activation._hook_problems(
        [_hook("ready")], ["ERROR: Failed to execute general plugin: streamfp8: boom"]
    )
    assert "boom" in problem


def test_idle_hooks_are_a_problem_even_where_nothing_was_said():
    assert len(activation._hook_problems([_hook("ready")], [])) == 1
    assert activation._hook_problems([_hook("active")], ["WARNING: something else"]) == []


@pytest.mark.parametrize("problems", [(), ("something",)])
def test_verdict_is_active_exactly_without_problems(problems):
    data = to_json(_activation(problems))
    assert data["active"] is (problems == ())
    assert data["streaming"][0]["state"] == "active"
