"""Makes or updates the branch `streamfp8/v<release>` in a clone of SGLang: the release's tag, then the patch series.

The series is made from the tag itself, so this is also how to try one on a release that is not supported yet. Where a
patch does not fit, its function is named, and what has changed there since a release that it fits. The clone's own
working tree, index and other branches are left as they are.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from workbench.releases import environment, misfits, repository, series
from workbench.releases.edits import EditError


class ForkError(Exception):
    """The branch cannot be made; the clone is unchanged."""


def branch_of(release: str) -> str:
    """Name of the branch for a release."""
    return f"streamfp8/v{release}"


def fork(clone: Path, release: str) -> str:
    """Set the branch to the release's tag plus the series; returns the commit.

    Raises:
        ForkError: there is no such tag, a patch does not fit, or somebody else has committed to the branch.
    """
    tag, branch = f"v{release}", branch_of(release)
    if not _has(clone, f"refs/tags/{tag}"):
        raise ForkError(f"{clone} has no tag {tag}; fetch it: git fetch origin tag {tag} --no-tags")
    _refuse_other_commits(clone, tag, branch)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        repository.git(clone, "worktree", "add", "--quiet", "--detach", str(tree), tag)
        try:
            for message, files in series.commits(tree / "python"):
                repository.commit(tree, files, message)
            commit = repository.git(tree, "rev-parse", "HEAD").strip()
        except EditError as error:
            raise ForkError(misfits.explained(error, tree / "python", release)) from error
        finally:
            repository.git(clone, "worktree", "remove", "--force", str(tree))
    repository.git(clone, "update-ref", f"refs/heads/{branch}", commit)
    return commit


def _refuse_other_commits(clone: Path, tag: str, branch: str) -> None:
    if not _has(clone, f"refs/heads/{branch}"):
        return
    if repository.git(clone, "branch", "--show-current").strip() == branch:
        raise ForkError(f"{branch} is checked out in {clone}; check out another branch first")
    authors = set(repository.git(clone, "log", "--format=%ae", f"{tag}..{branch}").split())
    others = sorted(authors - {repository.EMAIL})
    if others:
        raise ForkError(f"{branch} has commits by {', '.join(others)}, which an update would lose; move them elsewhere")


def _has(clone: Path, reference: str) -> bool:
    command = ["git", "rev-parse", "--quiet", "--verify", reference]
    return subprocess.run(command, cwd=clone, capture_output=True, check=False).returncode == 0


def main(arguments: list[str] | None = None) -> int:
    """Parse, make the branches, print."""
    parser = argparse.ArgumentParser(
        prog="ci/fork", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("clone", type=Path, help="a clone of SGLang that has the release's tag")
    supported = environment.supported()
    parser.add_argument("--release", default=supported[-1], help="all supported ones in turn, or any; the newest")
    options = parser.parse_args(arguments)
    for release in supported if options.release == "all" else [options.release]:
        try:
            print(f"{branch_of(release)} {fork(options.clone, release)}")
        except ForkError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
