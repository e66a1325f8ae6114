# SPDX-License-Identifier: Apache-2.0
"""``ci/sweep``: arguments and printing."""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click

from workbench.loads.loads import LoadWorkers
from workbench.quality import families, remote_families
from workbench.quality.sweep import BAD, sweep, to_json, to_markdown


def build(architecture: str, folder: Path) -> Path:
    """Write a tiny checkpoint of an architecture, and return its path."""
    if architecture in remote_families.FAMILIES:
        return remote_families.build(architecture, folder)
    return families.build(architecture, folder)


@click.command()
@click.argument("architectures", nargs=-1)
@click.option("--checkpoints", type=click.Path(path_type=Path), help="Where checkpoints are kept; else they are not.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the outcomes to this file.")
@click.option("--page", type=click.Path(path_type=Path), help="Write them as a page, such as docs/families.md.")
def main(architectures: tuple[str, ...], checkpoints: Path | None, json_file: Path | None, page: Path | None) -> None:
    """Load model families both ways: the given ARCHITECTURES, or all that a tiny checkpoint can be made of."""
    with tempfile.TemporaryDirectory() as scratch, LoadWorkers(Path(scratch) / "logs") as workers:
        kept = checkpoints or Path(scratch) / "checkpoints"
        names = architectures or (*families.architectures(), *remote_families.architectures())
        outcomes = []
        for outcome in sweep(names, partial(build, folder=kept), workers, Path(scratch) / "reports"):
            outcomes.append(outcome)
            click.echo(f"{outcome.architecture:45} {outcome.outcome:18} {outcome.detail}")
    release = version("sglang")
    if json_file is not None:
        json_file.write_text(to_json(release, outcomes))
    if page is not None:
        page.write_text(to_markdown(release, outcomes))
    sys.exit(int(any(outcome.outcome in BAD for outcome in outcomes)))


if __name__ == "__main__":
    main()
