"""The fork's branch in a local repository that stands for a clone of SGLang."""

from __future__ import annotations

from pathlib import Path

import pytest
from workbench.releases import fork, new_release, patched, repository, series
from workbench.releases.edits import fitting

from sglang_overlay import patches
from sglang_overlay.hooks import releases

RELEASE = releases.installed() or ""
BRANCH = f"streamfp8/v{RELEASE}"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with the release's tag, and a commit of upstream's after it."""
    repository.git(tmp_path, "init", "--quiet", "--initial-branch=main")
    repository.commit(tmp_path, series.touched(patched.installed()), "release")
    repository.git(tmp_path, "tag", f"v{RELEASE}")
    repository.commit(tmp_path, {"README.md": "later"}, "later")
    return tmp_path


def log(clone: Path) -> list[str]:
    return repository.git(clone, "log", "--format=%s", f"v{RELEASE}..{BRANCH}").splitlines()


@pytest.mark.every_release
def test_branch_is_the_tag_and_the_series(clone: Path) -> None:
    commit = fork.fork(clone, RELEASE)
    assert repository.git(clone, "rev-parse", BRANCH).strip() == commit
    assert len(log(clone)) == len(series.PATCHES)
    assert repository.git(clone, "merge-base", "main", BRANCH) == repository.git(clone, "rev-parse", f"v{RELEASE}")
    changed = {path: text for _, files in series.commits(patched.installed()) for path, text in files.items()}
    assert {path: repository.git(clone, "show", f"{BRANCH}:{path}") for path in changed} == changed


def test_clone_is_otherwise_left_alone(clone: Path) -> None:
    (clone / "mine.txt").write_text("not committed")
    before = repository.git(clone, "status", "--porcelain", "--branch")
    fork.fork(clone, RELEASE)
    assert repository.git(clone, "status", "--porcelain", "--branch") == before
    assert len(repository.git(clone, "worktree", "list").splitlines()) == 1


def test_branch_of_an_earlier_series_is_updated(clone: Path) -> None:
    wanted = fork.fork(clone, RELEASE)
    repository.git(clone, "update-ref", f"refs/heads/{BRANCH}", f"{BRANCH}~2")
    assert len(log(clone)) == len(series.PATCHES) - 2
    assert fork.fork(clone, RELEASE) == wanted
    assert repository.git(clone, "rev-parse", BRANCH).strip() == wanted


def test_commits_of_others_are_not_lost(clone: Path) -> None:
    fork.fork(clone, RELEASE)
    repository.git(clone, "checkout", "--quiet", BRANCH)
    repository.git(clone, "commit", "--quiet", "--allow-empty", "--author=A <a@b.invalid>", "--message=mine")
    repository.git(clone, "checkout", "--quiet", "main")
    with pytest.raises(fork.ForkError, match=r"a@b\.invalid"):
        fork.fork(clone, RELEASE)
    assert log(clone)[0] == "mine"


def test_branch_that_is_checked_out_is_not_moved(clone: Path) -> None:
    fork.fork(clone, RELEASE)
    repository.git(clone, "checkout", "--quiet", BRANCH)
    with pytest.raises(fork.ForkError, match="checked out"):
        fork.fork(clone, RELEASE)


def test_missing_tag_is_an_error_that_says_how_to_get_it(clone: Path) -> None:
    repository.git(clone, "tag", "--delete", f"v{RELEASE}")
    with pytest.raises(fork.ForkError, match=f"git fetch origin tag v{RELEASE}"):
        fork.fork(clone, RELEASE)


def test_tag_that_is_not_the_release_leaves_no_branch(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_release, "fetch", lambda _: patched.installed())
    repository.commit(clone, {"python/sglang/srt/environ.py": "# another\n"}, "another")
    repository.git(clone, "tag", "--force", f"v{RELEASE}")
    with pytest.raises(
        fork.ForkError, match=r"patch \d does not fit: python/sglang/srt/environ\.py, Envs: there is no"
    ):
        fork.fork(clone, RELEASE)
    assert BRANCH not in repository.git(clone, "branch", "--list")
    assert len(repository.git(clone, "worktree", "list").splitlines()) == 1


def test_every_release_gets_its_own_branch() -> None:
    names = {fork.branch_of(release) for release in releases.supported()}
    assert len(names) == len(releases.supported())
    assert all(patches.files_of(release) for release in releases.supported())


def test_series_is_rebased_on_each_release_in_turn_and_every_hunk_is_used(tmp_path: Path) -> None:
    repository.git(tmp_path, "init", "--quiet", "--initial-branch=main")
    used = set()
    for release in releases.supported():
        package = new_release.fetch(release)
        repository.commit(tmp_path, series.touched(package), release)
        repository.git(tmp_path, "tag", f"v{release}")
        fork.fork(tmp_path, release)
        for patch in series.PATCHES:
            read = series.before(package, patch.number)
            used |= {fit[0] for edit in series.edits_of(patch.number) if (fit := fitting(read, edit)) is not None}
    written = {hunk for patch in series.PATCHES for edit in series.edits_of(patch.number) for hunk in edit.hunks}
    assert [str(hunk) for hunk in written - used] == []
