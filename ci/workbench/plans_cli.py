"""``ci/plans``: arguments and printing."""

from __future__ import annotations

from pathlib import Path

import click

from sglang_overlay.upstream import releases
from workbench import baselines
from workbench.plans import PAGE, published, to_markdown


@click.command()
@click.option("--page", default=PAGE, type=click.Path(path_type=Path), help="The page to write.")
def main(page: Path) -> None:
    """Write the page that shows the newest release's baselines of the published models."""
    release = releases.supported()[-1]
    found = [(plan, baselines.read(baselines.path_of(release, plan.name))) for plan in published()]
    page.write_text(to_markdown(release, [(plan, baseline) for plan, baseline in found if baseline]), encoding="utf-8")
    click.echo(page)


if __name__ == "__main__":
    main()
