# SPDX-License-Identifier: Apache-2.0
"""``ci/bench``: arguments and printing."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from sglang_overlay.observe.formats import bytes_text
from workbench.bench import CONTENDERS, Run, alternate, document, figures, ratio
from workbench.checkpoints import SIZES, CheckpointSpec, build
from workbench.environment import cache_root
from workbench.loads import LoadWorkers

console = Console(width=120)


@click.command()
@click.option("--family", default="qwen3_moe", show_default=True, type=click.Choice(sorted(SIZES)))
@click.option("--size", default="bench_2g", show_default=True, help="A size of that family: tiny, demo, bench_2g, ...")
@click.option("--files", default=4, show_default=True, help="Number of weight files.")
@click.option("--shuffled", "file_names", flag_value="shuffled", help="Files come in no model order.")
@click.option("--ordered", "file_names", flag_value="ordered", default="ordered", help="Files come in model order.")
@click.option("--rounds", default=5, show_default=True, help="Counted runs of each contender.")
@click.option("--tp", default=1, show_default=True, help="Tensor-parallel ranks.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every run to this file.")
def main(family: str, size: str, files: int, file_names: str, rounds: int, tp: int, json_file: Path | None) -> None:
    """Compare peak memory and load time of stock bf16, stock fp8 and streaming in alternating runs."""
    spec = CheckpointSpec(family, size=size, files=files, file_names=file_names)  # type: ignore[arg-type]
    checkpoint = build(spec, cache_root() / "checkpoints")
    with tempfile.TemporaryDirectory() as folder, LoadWorkers(Path(folder)) as workers:
        runs = alternate(workers, checkpoint, rounds, tp, _say)
    console.print(_table(runs, f"{checkpoint.name}, {files} files {file_names}, TP={tp}, {rounds} rounds"))
    if json_file is not None:
        json_file.write_text(json.dumps(document(runs, checkpoint, tp), indent=2) + "\n")


def _say(run: Run) -> None:
    console.print(f"{run.contender:14} {run.seconds:6.2f} s  peak +{bytes_text(run.peak)}", highlight=False)


def _table(runs: list[Run], title: str) -> Table:
    table = Table(title=title)
    for heading in (
        "",
        "seconds",
        "min to max",
        "peak",
        "model",
        "peak / model",
        "peak / stock",
        "time / stock",
        "/ bf16",
    ):
        table.add_column(heading, justify="left" if not heading else "right")
    stock, bf16 = CONTENDERS[1].name, CONTENDERS[0].name
    for name, found in figures(runs).items():
        low, high = found.seconds_range
        table.add_row(
            name,
            f"{found.seconds:.2f}",
            f"{low:.2f} to {high:.2f}",
            bytes_text(found.peak),
            bytes_text(found.final),
            f"{found.peak_of_final:.3f}",
            f"{ratio(runs, name, stock, 'peak'):.2f}",
            f"{ratio(runs, name, stock, 'seconds'):.2f}",
            f"{ratio(runs, name, bf16, 'seconds'):.2f}",
        )
    return table


if __name__ == "__main__":
    main()
