"""A release's source tree with the patch series applied, to run instead of the installed package.

The tree is a git repository with SGLang's own layout, made from the published package, which has no tests and no
documentation; the series adds its own as new files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from sglang_overlay import patches
from sglang_overlay.hooks import releases
from workbench.releases import environment, repository

BRANCH = "release"
_PLUGINS = {"SGLANG_PLUGINS": "streamfp8_cpu_reference,streamfp8_cpu"}
"""The tree shadows the installed package; the only plugin allowed is the CPU reference platform."""


def installed() -> Path:
    """Folder that contains the installed `sglang` package."""
    root = releases.root()
    if root is None:
        raise ModuleNotFoundError("SGLang is not installed")
    return root


def make_tree(release: str, package: Path, folder: Path) -> Path:
    """Put a release's source tree into `folder`, one commit on a branch called `release`.

    Args:
        release: its version.
        package: folder that contains its `sglang` package.
        folder: must not exist, or be empty.
    """
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package / "sglang", folder / "python" / "sglang", ignore=ignored)
    repository.git(folder, "init", "--quiet", f"--initial-branch={BRANCH}")
    repository.git(folder, "add", "--all", "--force")
    repository.git(folder, "commit", "--quiet", f"--message=SGLang {release}")
    return folder


def apply_with_git(tree: Path, files: Iterable[Path]) -> None:
    """Apply patches with `git am` and its default settings: no fuzz, no three-way merge."""
    repository.git(tree, "am", "--quiet", *(str(file.resolve()) for file in files))


def apply_with_patch(tree: Path, files: Iterable[Path]) -> None:
    """Apply patches with `patch -p1`, without fuzz.

    Raises:
        RuntimeError: a patch does not fit.
    """
    for file in files:
        command = ["patch", "-p1", "--fuzz=0", "--batch", "--no-backup-if-mismatch", f"--input={file.resolve()}"]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        if done.returncode or "fuzz" in done.stdout:
            raise RuntimeError(f"{file.name} does not fit:\n{done.stdout}{done.stderr}")


def patched_tree(release: str) -> Path:
    """A tree of the installed release with the stored series applied, made once for each version of the series."""
    files = patches.files_of(release)
    state = environment.digest("".join(file.read_text(encoding="utf-8") for file in files))
    plan = environment.planned(release)
    # By clone, since an old tree is removed, and another clone may be running with it.
    home = plan.cache / "patched" / environment.digest(str(plan.clone)) / f"{release}-{state}"
    with environment.exclusive(home):
        if not (home / environment.MARKER).exists():
            for old in home.parent.glob(f"{release}-*/"):
                shutil.rmtree(old)
            home.mkdir(parents=True)
            apply_with_git(make_tree(release, installed(), home), files)
            environment.complete(home, release=release)
    return home


def main(arguments: list[str] | None = None) -> int:
    """Make a patched tree and print the variables to run it with, a line each: NAME=VALUE."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("release")
    options = parser.parse_args(arguments)
    search_path = [str(patched_tree(options.release) / "python"), os.environ.get("PYTHONPATH", "")]
    for name, value in {"PYTHONPATH": os.pathsep.join(filter(None, search_path)), **_PLUGINS}.items():
        print(f"{name}={value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
