"""Run git in the same way on every machine: with this project's author, a fixed date, and no user settings."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

AUTHOR = "sglang-streamfp8"
EMAIL = "noreply@sglang-streamfp8.invalid"
DATE = "2026-11-01T00:00:00+0000"
"""Date of all patches, so that they are the same whenever they are made."""


def commit(repository: Path, files: Mapping[str, str], message: str) -> None:
    """Write files into a repository and commit them."""
    for path, text in files.items():
        file = repository / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    git(repository, "add", "--force", "--", *files)
    # A post release may leave all of these files as they were.
    git(repository, "commit", "--quiet", "--allow-empty", f"--message={message}")


def git(repository: Path, *arguments: str) -> str:
    """Run git with the project's author and a fixed date, without the user's settings; returns its output."""
    settings = ("-c", f"user.name={AUTHOR}", "-c", f"user.email={EMAIL}", "-c", "core.autocrlf=false")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    fixed = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1", "GIT_AUTHOR_DATE": DATE, "TZ": "UTC"}
    done = subprocess.run(
        ["git", *settings, *arguments],
        cwd=repository,
        env={**kept, **fixed, "GIT_COMMITTER_DATE": DATE},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"git {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout
