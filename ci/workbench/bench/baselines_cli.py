"""``ci/baseline``: arguments and printing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import click
from rich.console import Console

from sglang_overlay.hooks import releases
from sglang_overlay.offline.plan.process import Planners
from workbench.bench import baselines, measured, plans
from workbench.bench.baselines import Found
from workbench.bench.baselines_view import describe
from workbench.releases.environment import cache_root

console = Console(width=140, highlight=False)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--refresh", is_flag=True, help="Write what was found as the new baseline; review its diff.")
@click.option("--measured", "with_measured", is_flag=True, help="Load for real on the CPU as well (minutes, GBs).")
@click.option("--folder", default=baselines.FOLDER, type=click.Path(path_type=Path), help="Where baselines are.")
@click.option("--charts", default=Path("baseline-charts"), type=click.Path(path_type=Path), help="For both timelines.")
def main(names: tuple[str, ...], refresh: bool, with_measured: bool, folder: Path, charts: Path) -> None:  # noqa: FBT001
    """Compare what the planner says of the published models with the baselines.

    NAMES leave it at some: of a model (DeepSeek-V3), at a TP size (DeepSeek-V3-tp8), or in an order of files
    (DeepSeek-V3-tp8-sorted). Exit code 1 where a planned figure differs or a measured peak is higher; then there is a
    table, and a chart of both timelines for each plan. It is the newest release that plans and loads, unless the first
    argument of all is --release RELEASE.
    """
    chosen = plans.published(names)
    if not chosen:
        raise click.BadParameter(f"none of the published plans is called {', '.join(names)}", param_hint="NAMES")
    release = releases.installed() or "unknown"
    found = chain(_planned(chosen), _measured() if with_measured else ())
    if refresh:
        for now in found:
            console.print(f"written  {baselines.refresh(now, release, folder)}")
        return
    differ = [now.name for now in found if _differs(now, release, folder, charts)]
    sys.exit(int(bool(differ)))


def _differs(now: Found, release: str, folder: Path, charts: Path) -> bool:
    before = baselines.read(baselines.path_of(release, now.name, folder)).get(now.kind, {})
    differences = now.compare(before)
    console.print(f"{'[red]differs[/red]' if differences else 'as before'}  {now.name} ({now.kind})")
    if differences:
        console.print(describe(now, before, differences, charts))
    return bool(differences)


def _planned(chosen: list[plans.PublishedPlan]) -> Iterator[Found]:
    with Planners(len(os.sched_getaffinity(0))) as planners:
        for asked, plan in plans.compute(planners, chosen):
            yield baselines.planned(asked.name, plan)


def _measured() -> Iterator[Found]:
    for model, peaks in measured.measure_all(cache_root() / "checkpoints"):
        yield baselines.measured(f"measured-{model.name}", peaks)


if __name__ == "__main__":
    main()
