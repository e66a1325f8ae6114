"""The patch series is what the sources make, fits the installed release, and each of its patches stands alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from workbench.releases import make_patches, patched, repository, series
from workbench.releases.edits import EditError, EnvironmentField, HookEdit, edited

from sglang_overlay import patches
from sglang_overlay.hooks import built_in, releases

RELEASE = releases.installed() or ""
MODULE = "sglang.srt.streaming.hooks"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree of the installed release, of which there are only the files that the series changes."""
    folder = tmp_path / "tree"
    folder.mkdir()
    repository.git(folder, "init", "--quiet", "--initial-branch=main")
    repository.commit(folder, series.touched(patched.installed()), "release")
    return folder


def contents(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file() and ".git" not in file.parts)
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


@pytest.mark.every_release
def test_stored_series_is_what_the_sources_make() -> None:
    assert make_patches.stale(RELEASE, patched.installed()) == []


def test_series_that_was_edited_by_hand_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(make_patches.FOLDER / RELEASE, tmp_path / RELEASE)
    name = patches.files_of(RELEASE)[2].name
    (tmp_path / RELEASE / name).write_text("by hand")
    (tmp_path / RELEASE / "0006-more.patch").write_text("")
    monkeypatch.setattr(make_patches, "FOLDER", tmp_path)
    assert make_patches.stale(RELEASE, patched.installed()) == [name, "0006-more.patch"]


@pytest.mark.every_release
@pytest.mark.parametrize("apply", [patched.apply_with_git, patched.apply_with_patch])
def test_series_applies_without_fuzz(apply: Callable[[Path, list[Path]], None], tree: Path) -> None:
    apply(tree, patches.files_of(RELEASE))
    final: dict[str, str] = series.touched(patched.installed())
    for _, files in series.commits(patched.installed()):
        final.update(files)
    assert contents(tree) == final


def test_series_only_adds_to_files_of_sglang() -> None:
    assert patches.files_of(RELEASE)
    for file in patches.files_of(RELEASE):
        _, _, diffs = file.read_text().partition("\ndiff --git ")
        lines = diffs.splitlines()
        removed = [line for line in lines if line.startswith("-") and not line.startswith("---")]
        assert all("@streaming_hook" in line for line in removed)


def test_no_patch_names_this_machine() -> None:
    home = str(Path.home())
    assert patches.files_of(RELEASE)
    for file in patches.files_of(RELEASE):
        text = file.read_text()
        assert home not in text
        assert f"From: {repository.AUTHOR} <{repository.EMAIL}>" in text


@pytest.mark.every_release
@pytest.mark.parametrize("count", range(1, len(series.PATCHES) + 1))
def test_sglang_with_the_first_patches_imports_and_passes_their_tests(count: int, whole_tree: Path) -> None:
    repository.git(whole_tree, "checkout", "--quiet", "--force", f"{patched.BRANCH}~{len(series.PATCHES) - count}")
    repository.git(whole_tree, "clean", "-fdxq", "-e", "__pycache__")
    package = whole_tree / "python" / Path(*built_in.PACKAGE.split("."))
    modules = [f"{built_in.PACKAGE}.{file.stem}" for file in package.glob("*.py")]
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    stock = ["sglang.srt.layers.quantization.fp8", "sglang.srt.model_loader.loader"]
    run_in(whole_tree, "-c", program, *stock, *modules)
    tests = sorted((whole_tree / series.UNIT_TESTS).glob("test_streaming_fp8_*.py"))
    assert len(tests) == (2 if count < 4 else 3)
    passed = run_in(whole_tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, tests))
    assert " passed" in passed


@pytest.fixture(scope="module")
def whole_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole source tree of the installed release with the series applied, a commit a patch."""
    folder = patched.make_tree(RELEASE, patched.installed(), tmp_path_factory.mktemp("whole") / "tree")
    patched.apply_with_git(folder, patches.files_of(RELEASE))
    return folder


def run_in(tree: Path, *arguments: str) -> str:
    """Run Python with a tree's SGLang in place of the installed one."""
    environ = {**os.environ, "PYTHONPATH": str(tree / "python"), "SGLANG_PLUGINS": "streamfp8_cpu_reference"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


SOURCE = """\
from sglang.srt.layers import a
from sglang.srt.utils import (
    b,
)


class Loader:
    @staticmethod
    def load(path):
        return path


def load(path):
    return path
"""


def test_decorator_stands_above_all_others() -> None:
    text = edited(SOURCE, [HookEdit("Loader.load", "entry:load")], MODULE, "loader.py")
    assert '    @streaming_hook("entry:load")\n    @staticmethod\n    def load(path):' in text
    assert text.count("streaming_hook(") == 1


def test_function_of_the_same_name_elsewhere_is_left_alone() -> None:
    text = edited(SOURCE, [HookEdit("load", "entry:load")], MODULE, "loader.py")
    assert '\n\n@streaming_hook("entry:load")\ndef load(path):' in text
    assert text.count("streaming_hook(") == 1


def test_import_stands_in_order() -> None:
    text = edited(SOURCE, [HookEdit("load", "entry:load")], MODULE, "loader.py")
    assert f"import a\nfrom {MODULE} import streaming_hook\nfrom sglang.srt.utils import (\n" in text


def test_environment_variable_follows_its_like() -> None:
    text = "class Envs:\n    SGLANG_SORT_WEIGHT_FILES = EnvInt(0)\n    OTHER = EnvInt(1)\n"
    field = EnvironmentField("NEW", "EnvBool(True)", ("What it is.",))
    assert edited(text, [field], "", "environ.py") == (
        "class Envs:\n    SGLANG_SORT_WEIGHT_FILES = EnvInt(0)\n    # What it is.\n    NEW = EnvBool(True)\n"
        "    OTHER = EnvInt(1)\n"
    )


@pytest.mark.parametrize("name", ["Loader.gone", "Gone.load", "gone"])
def test_function_that_a_release_lacks_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(EditError, match=rf"loader\.py has no function {name}"):
        edited(SOURCE, [HookEdit(name, "entry:load")], MODULE, "loader.py")


def test_environment_that_has_changed_is_an_error() -> None:
    with pytest.raises(EditError, match="does not declare SGLANG_SORT_WEIGHT_FILES"):
        edited("class Envs:\n    OTHER = 1\n", [EnvironmentField("NEW", "EnvBool(True)", ())], "", "environ.py")
