# SPDX-License-Identifier: Apache-2.0
"""Reading a release's source files says of each hook what importing the release would say."""

from __future__ import annotations

from importlib import util
from pathlib import Path

import pytest

from sglang_overlay.cpu_reference.catalogue import HOOKS
from sglang_overlay.hooks import hook, source_tree
from sglang_overlay.hooks.catalogue import OPTIONS, STREAMING, TELLING
from sglang_overlay.hooks.hook import Hook, HookKind, Place, State

INSTALLED = Path(util.find_spec("sglang").origin).parents[1]


@pytest.fixture
def package(tmp_path):
    """Writes modules of a package named ``up``, and gives the folder it lies in."""

    def write(**modules):
        (tmp_path / "up").mkdir(exist_ok=True)
        for name, text in modules.items():
            (tmp_path / "up" / f"{name}.py").write_text(text)
        return tmp_path

    return write


def point(target, parameters=("self",), **fields):
    return Hook(target, "os:getcwd", HookKind.AROUND, parameters, "a reason", (), "it is fixed", **fields)


ALL = (*STREAMING, *OPTIONS, *TELLING, *HOOKS)


@pytest.mark.parametrize("hooked", ALL, ids=lambda point: point.target.split(".", 3)[-1])
def test_sources_and_the_running_release_agree(hooked):
    imported, (read,) = hook.inspect_hook(hooked), source_tree.inspect_hooks(INSTALLED, [hooked])
    assert read.hook.target == imported.hook.target
    assert read.state is (State.READY if imported.state is State.ACTIVE else imported.state)


def test_method_of_a_base_class_is_found(package):
    root = package(a="class _Base:\n    def load(self, path): pass\nclass Loader(_Base): pass\n")
    assert source_tree.find(root, "up.a.Loader.load").parameters == ("self", "path")


def test_function_that_a_module_has_from_another_is_found(package):
    root = package(a="from up.b import work as load\n", b="def work(path, *, strict=True): pass\n")
    assert source_tree.find(root, "up.a.load").parameters == ("path", "strict")


def test_function_defined_in_a_branch_is_found(package):
    root = package(a="if True:\n    def load(path): pass\n")
    assert source_tree.find(root, "up.a.load").parameters == ("path",)


@pytest.mark.parametrize("target", ["up.a.load", "up.a.Loader.save", "up.a.Other.load", "up.c.load"])
def test_what_is_not_there_is_none(target, package):
    assert source_tree.find(package(a="class Loader:\n    def load(self): pass\n"), target) is None


def test_layout_and_comments_are_no_difference(package):
    root = package(
        a="def load(path):\n    return open(path)\n", b="def load( path ):\n    # why\n    return open( path )"
    )
    assert source_tree.find(root, "up.a.load").text == source_tree.find(root, "up.b.load").text


def test_other_parameters_are_shown(package):
    (found,) = source_tree.inspect_hooks(package(a="def load(path): pass\n"), [point("up.a.load", ("path", "device"))])
    assert (found.state, found.detail) == (State.SIGNATURE, "expected path, device; found path")


def test_target_is_found_where_an_earlier_release_had_it(package):
    moved = point("up.new.load", elsewhere=(Place("up.old.load", parameters=("path",)),))
    (found,) = source_tree.inspect_hooks(package(old="def load(path): pass\n"), [moved])
    assert (found.state, found.hook.target) == (State.READY, "up.old.load")


@pytest.mark.parametrize(("without", "state"), [("", State.MISSING), ("A thing.", State.ABSENT)])
def test_target_that_is_nowhere_is_absent_where_streaming_can_do_without(without, state, package):
    (found,) = source_tree.inspect_hooks(package(), [point("up.a.load", without=without)])
    assert (found.state, found.detail) == (state, without)


@pytest.mark.parametrize(
    "text",
    [
        "def load(path, *, strict=True):\n    return path if strict else None  # as ever",
        'def load(path: str, *, strict: bool = True) -> str:\n    """It loads."""\n    return path if strict else None',
        "def load(path, *, strict=True):\n    return (\n        path if strict\n        else None\n    )",
    ],
    ids=["comment", "docstring and annotations", "layout"],
)
def test_fingerprint_is_of_what_a_function_does(package, text):
    plain = "def load(path, *, strict=True): return path if strict else None"
    root = package(a=plain, b=text)
    assert source_tree.find(root, "up.a.load").fingerprint == source_tree.find(root, "up.b.load").fingerprint


@pytest.mark.parametrize(
    "text",
    [
        "def load(path, *, strict=False): return path if strict else None",
        "def load(path, *, strict=True): return path if strict else 0",
        "def load(path, *, strict=True): return path if strict else ''",
        "@cache\ndef load(path, *, strict=True): return path if strict else None",
        "def load(path, *, strict=True):\n    def inner(): return 1\n    return path if strict else None",
    ],
)
def test_another_body_has_another_fingerprint(package, text):
    root = package(a="def load(path, *, strict=True): return path if strict else None", b=text)
    assert source_tree.find(root, "up.a.load").fingerprint != source_tree.find(root, "up.b.load").fingerprint
