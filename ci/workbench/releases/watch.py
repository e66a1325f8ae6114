# SPDX-License-Identifier: Apache-2.0
"""Looks whether what is hooked has moved in SGLang: in its newest release, or in a source tree such as its main branch.

Compares every hooked function with the newest supported release's and prints the differences. The exit code is 1 where
a function can no longer be hooked; with --report, what was printed is then written to a file as Markdown, for an issue.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import click
from packaging.version import Version

from sglang_overlay.cpu_reference.catalogue import HOOKS
from sglang_overlay.hooks.catalogue import OPTIONS, STREAMING, TELLING
from workbench.releases import environment
from workbench.releases.new_release import Change, compare, fetch, report


def newest_release() -> str:
    """The newest release on the package index, without pre-releases.

    Raises:
        click.ClickException: the index does not answer.
    """
    plan = environment.planned()
    with tempfile.TemporaryDirectory() as nowhere:
        target = ["--dry-run", "--no-deps", "--target", nowhere, "--python", sys.executable]
        command = [str(environment.ensure_uv(plan)), "pip", "install", *target, "sglang"]
        done = subprocess.run(
            command, env=environment.step_environment(plan), capture_output=True, text=True, check=False
        )
    found = re.search(r"^ \+ sglang==(\S+)", done.stderr, re.MULTILINE)
    if found is None:
        raise click.ClickException(f"the package index does not tell SGLang's newest release:\n{done.stderr}")
    return found.group(1)


def source_root(tree: Path) -> Path:
    """Folder that contains the ``sglang`` package: ``python`` in a checkout.

    Raises:
        click.ClickException: there is none.
    """
    for folder in (tree / "python", tree):
        if (folder / "sglang" / "srt").is_dir():
            return folder
    raise click.ClickException(f"there is no SGLang in {tree}")


def as_markdown(changes: list[Change], before: str, after: str) -> str:
    """An issue's text: what cannot be hooked first, then every difference."""
    broken = [f"- `{change.target}`: {change.problem}" for change in changes if change.problem]
    head = (
        f"With {after}, {len(broken)} of the hooked functions are not as expected. Fp8 loads there take stock's path."
    )
    details = f"```diff\n{report(changes, before, after)}\n```"
    return "\n".join([head, "", *broken, "", details, ""])


@click.command(help=__doc__)
@click.option("--tree", type=click.Path(exists=True, path_type=Path), help="A source tree; else the newest release.")
@click.option("--report", "report_file", type=click.Path(path_type=Path), help="Written where something has moved.")
def main(tree: Path | None, report_file: Path | None) -> None:
    """Compare and print."""
    before = max(environment.supported(), key=Version)
    if tree is None:
        after = newest_release()
        root = fetch(after)
    else:
        after, root = "this source tree", source_root(tree)
    changes = compare(fetch(before), root, (*STREAMING, *OPTIONS, *TELLING, *HOOKS))
    click.echo(report(changes, before, after))
    if not any(change.problem for change in changes):
        return
    if report_file is not None:
        report_file.write_text(as_markdown(changes, before, after), encoding="utf-8")
    raise SystemExit(1)


if __name__ == "__main__":
    main()
