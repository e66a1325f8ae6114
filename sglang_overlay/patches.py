# SPDX-License-Identifier: Apache-2.0
"""The patch series that add streaming to SGLang's own source tree, and how to apply one."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.hooks import built_in, releases

SERIES = "series"
_CHANGED = re.compile(r"^diff --git a/(\S+) b/\S+\n(?:new file mode \d+\n)?index ([0-9a-f]{40})\.\.", re.MULTILINE)
PACKAGE = Path("python", *built_in.PACKAGE.split("."))
"""The folder that a series adds to SGLang's source tree."""


class PatchError(StreamFP8Error):
    """A patch series cannot be applied; the tree is unchanged."""


def files_of(release: str) -> list[Path]:
    """The series for a release, in order.

    Raises:
        PatchError: there is none.
    """
    folder = _folder() / release
    if not (folder / SERIES).is_file():
        known = ", ".join(sorted(found.parent.name for found in _folder().glob(f"*/{SERIES}")))
        raise PatchError(f"There is no patch series for SGLang {release}. There are series for: {known}.")
    return [folder / name for name in (folder / SERIES).read_text(encoding="utf-8").split()]


def release_of(tree: Path) -> str:
    """The release of a source tree, by the files that its series changes; else a release whose series fits.

    Raises:
        PatchError: no series fits, or ``tree`` is not an SGLang source tree.
    """
    check_tree(tree)
    series = {release: files_of(release) for release in reversed(releases.supported())}
    for fits in (_is_made_for, lambda tree, files: problem_with(tree, files) is None):
        for release, files in series.items():
            if fits(tree, files):
                return release
    raise PatchError(
        f"No series fits {tree}; nothing was changed. Series are for releases: {', '.join(releases.supported())}. "
        "Say which one this tree should be with --release, and the first hunk that does not fit is shown."
    )


def check_tree(tree: Path) -> None:
    """Make sure that a folder is an unpatched SGLang source tree.

    Raises:
        PatchError: it is not.
    """
    if not (tree / "python" / "sglang" / "srt").is_dir():
        raise PatchError(
            f"{tree} is no source tree of SGLang's: it has no python/sglang/srt. Give the "
            "folder of a clone of github.com/sgl-project/sglang."
        )
    if (tree / PACKAGE).exists():
        raise PatchError(f"{tree} streams already: it has {PACKAGE.as_posix()}. Nothing was changed.")


def apply(tree: Path, release: str) -> list[Path]:
    """Apply a release's series to the files of a source tree, as ``git apply`` does, without any commits.

    Returns:
        The patches applied.

    Raises:
        PatchError: it does not fit; nothing was changed.
    """
    check_tree(tree)
    files = files_of(release)
    problem = problem_with(tree, files)
    if problem is not None:
        raise PatchError(f"The series for SGLang {release} does not fit {tree}; nothing was changed. {problem}")
    done = _git_apply(tree, files)
    if done.returncode:
        raise PatchError(f"git apply failed: {done.stderr.strip()}")
    return files


def problem_with(tree: Path, files: Sequence[Path]) -> str | None:
    """Why a series does not fit a tree, with the patch and the file, or None if it fits. Changes nothing."""
    if not _git_apply(tree, files, "--check").returncode:
        return None
    for number, file in enumerate(files, 1):
        told = _git_apply(tree, files[:number], "--check").stderr.splitlines()
        errors = [line.removeprefix("error: ") for line in told if line.startswith("error: ")]
        if errors:
            return f"{file.name} does not apply: {'; '.join(errors)}."
    return "git says that it does not apply, but no patch of it by itself."


def _is_made_for(tree: Path, files: Sequence[Path]) -> bool:
    """Whether the files that a series changes are byte for byte those that it was made from."""
    before: dict[str, str] = {}
    for file in files:
        for path, blob in _CHANGED.findall(file.read_text(encoding="utf-8")):
            before.setdefault(path, blob)
    return all(_blob(tree / path) == blob for path, blob in before.items() if blob.strip("0"))


def _blob(file: Path) -> str | None:
    """Git's hash of a file's contents; None if there is no such file."""
    if not file.is_file():
        return None
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _git_apply(tree: Path, files: Sequence[Path], *options: str) -> subprocess.CompletedProcess[str]:
    """Apply all patches in one call, so that either all of them are applied or none."""
    # Hide any repository: git silently skips files outside the one it finds.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environ = {**kept, "GIT_DIR": str(tree / "no-repository"), "LC_ALL": "C"}
    try:
        return subprocess.run(
            ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn", *options],
            input="".join(file.read_text(encoding="utf-8") for file in files),
            cwd=tree,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise PatchError("git is needed to apply patches, and is not installed.") from None


def _folder() -> Path:
    """The series are in the package in a wheel, and beside it in a clone."""
    with resources.as_file(resources.files("sglang_overlay")) as package:
        packed = package / "patch_series"
        return packed if packed.is_dir() else package.parent / "patches"
