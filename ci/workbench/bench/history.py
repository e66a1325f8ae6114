# SPDX-License-Identifier: Apache-2.0
"""What nightly runs measured, a JSON line for each checkpoint and night, and a chart of it over time.

    ci/history add history.jsonl bench.json --date 2026-11-21
    ci/history chart history.jsonl chart.png

A line holds ratios, which compare neighbouring runs on one machine; seconds of different nights' machines tell nothing.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from sglang_overlay.observe.chart import INK
from workbench.bench.bench import BF16, STOCK, STREAMING, Run, figures, ratio
from workbench.bench.chart_style import dress, empty_figure

Line = dict[str, Any]

_PANELS = (
    ("peak_of_model", "peak memory / loaded model"),
    ("peak_of_stock", "peak memory / stock fp8"),
    ("seconds_of_stock", "load time / stock fp8"),
    ("seconds_of_bf16", "load time / stock bf16"),
)


def lines_of(document: Mapping[str, Any], date: datetime.date) -> list[Line]:
    """One line for each case in a document of ``ci/bench --json``."""
    return [
        {
            "date": date.isoformat(),
            "commit": document["commit"],
            "sglang": document["versions"]["sglang"],
            "machine": document["machine"],
            "case": case["name"],
            **_ratios([Run(**run) for run in case["runs"]]),
        }
        for case in document["cases"]
    ]


def _ratios(runs: Sequence[Run]) -> dict[str, float]:
    found = {
        "peak_of_model": figures(runs)[STREAMING.name].peak_of_final,
        "peak_of_stock": ratio(runs, STREAMING.name, STOCK.name, "peak"),
        "seconds_of_stock": ratio(runs, STREAMING.name, STOCK.name, "seconds"),
        "seconds_of_bf16": ratio(runs, STREAMING.name, BF16.name, "seconds"),
    }
    return {name: round(value, 4) for name, value in found.items()}


def add(history: Path, lines: Sequence[Line]) -> None:
    """Append lines; a line of the same case, date, commit and release is replaced."""
    replaced = {_key(line) for line in lines}
    kept = [line for line in read(history) if _key(line) not in replaced]
    history.parent.mkdir(parents=True, exist_ok=True)
    draft = history.with_suffix(".part")
    draft.write_text("".join(json.dumps(line) + "\n" for line in [*kept, *lines]), encoding="utf-8")
    draft.replace(history)


def _key(line: Line) -> tuple[str, ...]:
    return line["date"], line["commit"], line["sglang"], line["case"]


def read(history: Path) -> list[Line]:
    """All lines, in order; empty if there is no file yet.

    Raises:
        click.ClickException: a line is not JSON.
    """
    if not history.exists():
        return []
    lines = []
    for number, text in enumerate(history.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise click.ClickException(f"{history}, line {number}, is no JSON: {error}") from error
    return lines


def draw(lines: Sequence[Line], file: Path) -> None:
    """Draw a panel for each ratio with a curve for each case."""
    figure = empty_figure(11, 7)
    panels = figure.subplots(2, 2, sharex=True).flat
    ordered = sorted(lines, key=lambda line: (line["case"], line["date"]))
    for panel, (measured, title) in zip(panels, _PANELS, strict=True):
        for case, nights in groupby(ordered, key=lambda line: str(line["case"])):
            points = [(datetime.date.fromisoformat(night["date"]), night[measured]) for night in nights]
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.4, label=case)
        panel.axhline(1.0, color=INK, linestyle=(0, (5, 3)), linewidth=0.8)
        panel.set_title(title, loc="left", color=INK, fontsize=11)
        panel.set_ylim(bottom=0)
        dress(panel)
    figure.axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.autofmt_xdate()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, format="png", dpi=140)


@click.group(help=__doc__)
def main() -> None:
    """Two commands: add and chart."""


@main.command("add")
@click.argument("history", type=click.Path(path_type=Path))
@click.argument("documents", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--date", type=click.DateTime(["%Y-%m-%d"]), default=lambda: datetime.date.today().isoformat())
def add_documents(history: Path, documents: tuple[Path, ...], date: datetime.datetime) -> None:
    """Append what ci/bench --json wrote."""
    lines = [line for file in documents for line in lines_of(json.loads(file.read_text()), date.date())]
    add(history, lines)
    for line in lines:
        click.echo(f"{line['case']}: peak {line['peak_of_model']} x model, {line['seconds_of_stock']} x stock's time")


@main.command("chart")
@click.argument("history", type=click.Path(exists=True, path_type=Path))
@click.argument("png", type=click.Path(path_type=Path))
def chart(history: Path, png: Path) -> None:
    """Draw all of it."""
    draw(read(history), png)


if __name__ == "__main__":
    main()
