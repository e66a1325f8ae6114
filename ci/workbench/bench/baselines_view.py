"""Show differences from a baseline: a table of figures, and a chart of both timelines."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sglang_overlay.observe.formats import bytes_text
from sglang_overlay.offline.plan.timeline import Line, draw_lines
from workbench.bench.baselines import Difference, Figures, Found, samples_of

_WIDTH = 130


def describe(now: Found, before: Mapping[str, Figures], differences: Sequence[Difference], charts: Path) -> str:
    """The table and, for a plan, the path of its chart, which is drawn in the folder ``charts``."""
    lines = [_text(_table(differences))]
    if now.kind == "planned":
        lines.append(f"both timelines: {_chart(now, before, differences, charts)}")
    return "\n".join([*lines, f"If that is meant: ci/baseline {now.name} --refresh"])


def _table(differences: Sequence[Difference]) -> Table:
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


def _text(table: Table) -> str:
    out = io.StringIO()
    Console(file=out, width=_WIDTH).print(table)
    return out.getvalue()


def _chart(now: Found, before: Mapping[str, Figures], differences: Sequence[Difference], charts: Path) -> Path:
    """Draw both timelines of the modes that differ."""
    modes = dict.fromkeys(difference.load for difference in differences)
    lines = []
    for mode in modes:
        sides = (("baseline", 1, before.get(mode)), ("now", 0, now.figures.get(mode)))
        lines += [Line(f"{mode}, {side}", colour, samples_of(found)) for side, colour, found in sides if found]
    final = max(figures["final_bytes"] for figures in now.figures.values())
    return draw_lines(lines, {"loaded model": final}, charts / f"{now.name}.png", f"{now.name}: baseline and now")
