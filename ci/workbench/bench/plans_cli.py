# SPDX-License-Identifier: Apache-2.0
"""``ci/plans``: arguments and printing."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sglang_overlay.hooks import releases
from workbench.bench import baselines, readme
from workbench.bench.plans import PAGE, published, to_markdown


@click.command()
@click.option("--page", default=PAGE, type=click.Path(path_type=Path), help="The page to write.")
@click.option("--readme", "summary", default=readme.PAGE, type=click.Path(path_type=Path), help="The README.")
def main(page: Path, summary: Path) -> None:
    """Write the page that shows the newest release's baselines of the published models, and README.md's table."""
    release = releases.supported()[-1]
    read = [(plan, baselines.read(baselines.path_of(release, plan.name))) for plan in published()]
    found = [(plan, baseline) for plan, baseline in read if baseline]
    page.write_text(to_markdown(release, found), encoding="utf-8")
    bench = json.loads(readme.BENCH.read_text(encoding="utf-8"))
    summary.write_text(readme.with_table(summary.read_text(encoding="utf-8"), bench, found), encoding="utf-8")
    click.echo(f"{page}\n{summary}")


if __name__ == "__main__":
    main()
