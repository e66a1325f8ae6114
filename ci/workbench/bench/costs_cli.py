"""``ci/costs``: arguments and printing."""

from __future__ import annotations

import os
from pathlib import Path

import click

from sglang_overlay.hooks import releases
from sglang_overlay.offline.plan.process import Planners
from workbench.bench.costs import MODELS, PAGE, TASK, planned, to_markdown


@click.command()
@click.option("--page", default=PAGE, type=click.Path(path_type=Path), help="The page to write.")
@click.argument("models", nargs=-1, type=click.Choice([*MODELS]))
def main(page: Path, models: tuple[str, ...]) -> None:
    """Plan MODELS, all published ones unless named, and write the page of what their loads ask of a GPU."""
    with Planners(len(os.sched_getaffinity(0)), TASK) as planners:
        costs = list(planned(planners, models or [*MODELS]))
    page.write_text(to_markdown(releases.supported()[-1], costs), encoding="utf-8")
    click.echo(page)


if __name__ == "__main__":
    main()
