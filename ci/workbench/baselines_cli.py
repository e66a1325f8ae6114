"""``ci/baseline``: arguments and printing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from sglang_overlay.observe.formats import bytes_text
from sglang_overlay.plan.process import Planners
from sglang_overlay.plan.timeline import Line, draw_lines
from sglang_overlay.upstream import releases
from workbench import baselines, measured, plans
from workbench.baselines import Difference, Figures
from workbench.environment import cache_root

Found = tuple[str, str, dict[str, Figures], dict[str, Any]]
"""Name of a baseline, what in it was worked out, the figures, and what else it says of the model."""

console = Console(width=140, highlight=False)


@click.command()
@click.argument("models", nargs=-1)
@click.option("--refresh", is_flag=True, help="Write what was found as the new baseline; review its diff.")
@click.option("--measured", "with_measured", is_flag=True, help="Load for real on the CPU as well (minutes, GBs).")
@click.option("--folder", default=baselines.FOLDER, type=click.Path(path_type=Path), help="Where baselines are.")
@click.option("--charts", default=Path("baseline-charts"), type=click.Path(path_type=Path), help="For both timelines.")
def main(models: tuple[str, ...], refresh: bool, with_measured: bool, folder: Path, charts: Path) -> None:  # noqa: FBT001
    """Compare what the planner says of the published models, or MODELS of them, with the baselines.

    Exit code 1 where a planned figure differs or a measured peak is higher; then there is a table, and a chart of both
    timelines for each plan.
    """
    release = releases.installed() or "unknown"
    differences: list[Difference] = []
    for name, kind, now, facts in _found(models, with_measured):
        path = baselines.path_of(release, name, folder)
        before = baselines.read(path)
        if refresh:
            baselines.write(path, {**before, "name": name, "release": release, **facts, kind: now})
            console.print(f"written  {path}")
            continue
        compare = baselines.compare_planned if kind == "planned" else baselines.compare_measured
        changed = compare(name, before.get(kind, {}), now)
        console.print(f"{'[red]differs[/red]' if changed else 'as before'}  {name} ({kind})")
        if changed and kind == "planned":
            console.print(f"  both timelines: {chart(name, before.get(kind, {}), now, charts)}")
        differences += changed
    if differences:
        console.print(table(differences))
    sys.exit(int(bool(differences)))


def _found(models: tuple[str, ...], with_measured: bool) -> Iterator[Found]:  # noqa: FBT001
    with Planners(len(os.sched_getaffinity(0))) as planners:
        for asked, plan in plans.compute(planners, plans.published(models)):
            yield asked.name, "planned", baselines.figures_of(plan), baselines.facts_of(plan)
    if with_measured:
        for model in measured.MODELS:
            peaks = {mode: peak for _, mode, peak in measured.measure_all((model,), cache_root() / "checkpoints")}
            yield f"measured-{model.name}", "measured", {mode: {"peak_bytes": peak} for mode, peak in peaks.items()}, {}


def table(differences: list[Difference]) -> Table:
    """A row for each figure that differs."""
    found = Table(header_style="dim", box=None, pad_edge=False)
    for heading in ("plan", "load", "figure"):
        found.add_column(heading, no_wrap=True)
    for heading in ("baseline", "now", "change"):
        found.add_column(heading, justify="right", no_wrap=True)
    for difference in differences:
        text = bytes_text if difference.figure.endswith("_bytes") else str
        row = (difference.plan, difference.load, difference.figure)
        found.add_row(*row, text(difference.before), text(difference.now), difference.change)
    return found


def chart(name: str, before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> Path:
    """Both timelines of every mode that differs in one picture."""
    lines = []
    for mode, figures in now.items():
        if mode in before and baselines.compare_planned(name, {mode: before[mode]}, {mode: figures}):
            lines.append(Line(f"{mode}, baseline", 1, baselines.samples_of(before[mode])))
            lines.append(Line(f"{mode}, now", 0, baselines.samples_of(figures)))
    if not lines:
        lines = [Line(f"{mode}, now", 0, baselines.samples_of(figures)) for mode, figures in now.items()]
    final = next(iter(now.values()))["final_bytes"]
    return draw_lines(lines, {"loaded model": final}, folder / f"{name}.png", f"{name}: baseline and now")


if __name__ == "__main__":
    main()
