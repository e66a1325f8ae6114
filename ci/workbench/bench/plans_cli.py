"""``ci/plans``: arguments and printing."""

from __future__ import annotations

from pathlib import Path

import click

from sglang_overlay.hooks import releases
from workbench.bench import baselines
from workbench.bench.page_tables import README
from workbench.bench.plans import PAGE, published, to_markdown, with_table


@click.command()
@click.option("--page", default=PAGE, type=click.Path(path_type=Path), help="The page to write.")
@click.option("--readme", default=README, type=click.Path(path_type=Path), help="The page whose table to write.")
def main(page: Path, readme: Path) -> None:
    """Write the page that shows the newest release's baselines of the published models, and the table in README.md."""
    release = releases.supported()[-1]
    read = [(plan, baselines.read(baselines.path_of(release, plan.name))) for plan in published()]
    found = [(plan, baseline) for plan, baseline in read if baseline]
    page.write_text(to_markdown(release, found), encoding="utf-8")
    readme.write_text(with_table(readme.read_text(encoding="utf-8"), found), encoding="utf-8")
    click.echo(f"{page}\n{readme}")


if __name__ == "__main__":
    main()
