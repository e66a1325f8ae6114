# SPDX-License-Identifier: Apache-2.0
"""``ci/sweep``: arguments and printing."""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import click

from workbench.quality.making import Making
from workbench.quality.registered import registered
from workbench.quality.sweep import BAD, to_json, to_markdown, try_one


@click.command()
@click.argument("architectures", nargs=-1)
@click.option("--checkpoints", type=click.Path(path_type=Path), help="Where checkpoints are kept; else they are not.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the outcomes to this file.")
@click.option("--page", type=click.Path(path_type=Path), help="Write them as a page, such as docs/families.md.")
def main(architectures: tuple[str, ...], checkpoints: Path | None, json_file: Path | None, page: Path | None) -> None:
    """Load model families both ways: the given ARCHITECTURES, or all that a tiny checkpoint can be made of."""
    with tempfile.TemporaryDirectory() as name, Making(checkpoints or Path(name) / "checkpoints", Path(name)) as making:
        outcomes = []
        for architecture in architectures or registered():
            workers, reports = making.workers(architecture), Path(name) / "reports" / architecture
            outcome = try_one(architecture, making.job, workers, reports)
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
