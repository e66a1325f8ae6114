"""Applying a series to a source tree: all of it, or nothing and a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from workbench.releases import patched, repository, series

from sglang_overlay import patches
from sglang_overlay.cli import main
from sglang_overlay.hooks import releases
from sglang_overlay.patches import PatchError

RELEASE = releases.installed()
TEXTS = {name: [file.read_text() for file in patches.files_of(name)] for name in releases.supported()}
ALIKE = {name for name, texts in TEXTS.items() if texts == TEXTS[RELEASE]}
"""Releases whose changed files are those of the installed one, such as 0.5.13 and 0.5.13.post1."""
LOADER = Path("python", "sglang", "srt", "model_loader", "loader.py")


@pytest.fixture
def tree(tmp_path):
    """The files of the installed release that the series changes."""
    for path, text in series.touched(patched.installed()).items():
        file = tmp_path / "sglang" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "sglang"


def contents(folder):
    return {file.relative_to(folder): file.read_text() for file in folder.rglob("*") if file.is_file()}


def patch(*arguments):
    return CliRunner().invoke(main, ["patch", *map(str, arguments)])


@pytest.mark.every_release
def test_series_is_applied_to_the_tree_whose_release_it_is_for(tree):
    done = patch("--apply", tree)
    assert done.exit_code == 0, done.output
    assert any(f"SGLang {release} with streaming" in done.output for release in ALIKE)
    assert done.output.count("applied 000") == len(series.PATCHES)
    assert (tree / patches.PACKAGE / "stream.py").is_file()
    changed = {path: text for _, files in series.commits(patched.installed()) for path, text in files.items()}
    assert {path: (tree / path).read_text() for path in changed} == changed


def test_json_names_the_release_and_what_was_applied(tree):
    done = patch("--apply", tree, "--json")
    told = json.loads(done.stdout)
    assert (told["schema"], told["version"]) == ("sglang-streamfp8/patch", 1)
    assert told["release"] in ALIKE
    assert told["tree"] == str(tree)
    assert [name[:4] for name in told["applied"]] == [f"{number + 1:04}" for number in range(len(series.PATCHES))]


def test_tree_inside_of_another_repository_is_patched_all_the_same(tree):
    repository.git(tree.parent, "init", "--quiet")
    assert patch("--apply", tree, "--release", RELEASE).exit_code == 0
    assert (tree / patches.PACKAGE / "stream.py").is_file()


def test_tree_that_has_changed_is_left_as_it_is_and_the_place_is_named(tree):
    (tree / LOADER).write_text((tree / LOADER).read_text().replace("\n", "  # changed\n"))
    first = next(file.name for file in patches.files_of(RELEASE) if f"+++ b/{LOADER}" in file.read_text())
    before = contents(tree)
    done = patch("--apply", tree, "--release", RELEASE)
    assert done.exit_code == 1
    assert "nothing was changed" in done.output
    assert first in done.output
    assert LOADER.as_posix() in done.output
    assert contents(tree) == before


def test_tree_of_no_known_release_is_left_as_it_is(tree):
    (tree / LOADER).write_text("# nothing\n")
    before = contents(tree)
    with pytest.raises(PatchError, match="No series fits"):
        patches.release_of(tree)
    assert patch("--apply", tree).exit_code == 1
    assert contents(tree) == before


def test_tree_that_streams_already_is_refused(tree):
    assert patch("--apply", tree, "--release", RELEASE).exit_code == 0
    before = contents(tree)
    again = patch("--apply", tree)
    assert again.exit_code == 1
    assert "streams already" in again.output
    assert contents(tree) == before


def test_folder_that_is_no_tree_is_refused(tmp_path):
    done = patch("--apply", tmp_path)
    assert done.exit_code == 1
    assert "no python/sglang/srt" in done.output


def test_release_without_a_series_is_refused_and_the_others_are_named(tree):
    done = patch("--apply", tree, "--release", "0.4.0")
    assert done.exit_code == 1
    assert releases.supported()[0] in done.output


def test_every_supported_release_has_a_series():
    for release in releases.supported():
        files = patches.files_of(release)
        assert len(files) == len(series.PATCHES)
        assert all(file.is_file() for file in files)
