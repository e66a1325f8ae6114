# SPDX-License-Identifier: Apache-2.0
"""``ci/bench``: arguments and printing."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import get_args

import click
from rich.console import Console
from rich.table import Table

from sglang_overlay.observe.formats import bytes_text
from workbench.bench import restart_bench, update_bench
from workbench.bench.bench import (
    ABLATED,
    BENCH_FAMILIES,
    BF16,
    CONTENDERS,
    INTERCEPTING,
    ONE_PASS,
    ORDERS,
    STOCK,
    Case,
    CaseResult,
    FileOrder,
    Run,
    added_seconds_a_tensor,
    figures,
    measure,
    overhead_case,
    ratio,
    remove,
    scaling_cases,
    size_cases,
)
from workbench.bench.bench_chart import draw, draw_updates
from workbench.bench.bench_document import document, with_table
from workbench.loads.checkpoints import Family, checkpoint_path
from workbench.loads.loads import LoadWorkers
from workbench.releases.environment import cache_root

console = Console(width=165)


def _numbers(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 0.5,1,2") from None


@click.command()
@click.option(
    "--family",
    "families",
    multiple=True,
    type=click.Choice(BENCH_FAMILIES),
    default=["qwen3_moe"],
    show_default=True,
    help="Shape of the model; may be given more than once.",
)
@click.option("--sizes", default="2", callback=_numbers, show_default=True, help="GB of bf16 weights, such as 0.5,1,2.")
@click.option(
    "--order",
    "orders",
    multiple=True,
    type=click.Choice(get_args(FileOrder)),
    default=["sorted"],
    show_default=True,
    help="How weight files are read; may be given more than once. staggered has two ranks.",
)
@click.option("--all", "everything", is_flag=True, help="All families and orders.")
@click.option("--scaling", is_flag=True, help="Vary size, layers, experts and threads instead.")
@click.option(
    "--overhead",
    is_flag=True,
    help="Thousands of tiny tensors instead, and also streamed without quantizing them.",
)
@click.option("--floor", is_flag=True, help="Also read each weight once and write it once, without finding its scale.")
@click.option("--ablation", is_flag=True, help="Also without each part that the CPU reference loads fast by.")
@click.option("--restart", is_flag=True, help="Starts that write and read what was loaded instead (presharded).")
@click.option("--updates", is_flag=True, help="Full weight updates instead, beside those of stock's bf16.")
@click.option("--rounds", default=5, show_default=True, help="Counted runs of each contender.")
@click.option("--tp", default=1, show_default=True, help="Tensor-parallel ranks.")
@click.option("--keep", is_flag=True, help="Leave the checkpoints where they are, for the next time.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every run to this file.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw the chart into this file, PNG or SVG.")
@click.option("--page", type=click.Path(path_type=Path, exists=True), help="Write the table into this page as well.")
def main(
    families: tuple[Family, ...],
    sizes: tuple[float, ...],
    orders: tuple[FileOrder, ...],
    everything: bool,  # noqa: FBT001
    scaling: bool,  # noqa: FBT001
    overhead: bool,  # noqa: FBT001
    floor: bool,  # noqa: FBT001
    ablation: bool,  # noqa: FBT001
    restart: bool,  # noqa: FBT001
    updates: bool,  # noqa: FBT001
    rounds: int,
    tp: int,
    keep: bool,  # noqa: FBT001
    json_file: Path | None,
    png: Path | None,
    page: Path | None,
) -> None:
    """Compare peak memory and load time of stock bf16, stock fp8, streaming of layers in two ways, and streaming."""
    if everything:
        families, orders = BENCH_FAMILIES, ORDERS
    series, axis = _series(families, sizes, orders, tp, scaling=scaling, overhead=overhead)
    contenders = CONTENDERS + overhead * (INTERCEPTING,) + floor * (ONE_PASS,) + ablation * ABLATED
    run: Callable[..., CaseResult] = partial(measure, contenders=contenders)
    if restart or updates:
        run = restart_bench.measure_restarts if restart else update_bench.measure_updates
    with tempfile.TemporaryDirectory() as logs, LoadWorkers(Path(logs)) as workers:
        measured = {
            heading: [_measured(partial(run, workers), case, rounds, keep=keep) for case in cases]
            for heading, cases in series.items()
        }
    results = [result for column in measured.values() for result in column]
    about = restart_bench.document(results) if restart else document(results)
    if json_file is not None:
        json_file.write_text(json.dumps(about, indent=2) + "\n")
    if page is not None:
        put_in = restart_bench.with_table if restart else update_bench.with_table if updates else with_table
        page.write_text(put_in(page.read_text(encoding="utf-8"), about), encoding="utf-8")
    if restart:
        console.print(_plain_table(restart_bench.COLUMNS, restart_bench.rows_of(about)))
        return
    if updates:
        console.print(_plain_table(update_bench.COLUMNS, update_bench.table_rows(about)))
        if png is not None:
            draw_updates(results, png, f"A full weight update, medians of {rounds} alternating runs")
        return
    console.print(_table(results, rounds))
    if png is not None:
        draw(measured, axis, png, f"Loading with --quantization fp8, medians of {rounds} alternating runs")


def _series(
    families: Iterable[Family],
    sizes: Iterable[float],
    orders: Iterable[FileOrder],
    tp: int,
    *,
    scaling: bool,
    overhead: bool,
) -> tuple[Mapping[str, list[Case]], Mapping[str, str]]:
    """The cases by heading, and what the axis of each heading shows."""
    if scaling:
        axis = {"size": "bf16 weights, GB", "layers": "layers", "experts": "experts a layer", "threads": "threads"}
        return scaling_cases(_thread_numbers()), axis
    if overhead:
        return {"overhead": [overhead_case()]}, {"overhead": "checkpoints"}
    series = {f"{family}, {order}": size_cases([family], sizes, [order], tp) for family in families for order in orders}
    return series, dict.fromkeys(series, "bf16 weights, GB")


def _thread_numbers() -> list[int]:
    """1, 2, 4, ... up to the number of cores."""
    cores = len(os.sched_getaffinity(0))
    return [number for number in (1, 2, 4, 8, 16) if number <= cores]


def _measured(run: Callable[..., CaseResult], case: Case, rounds: int, *, keep: bool) -> CaseResult:
    folder = cache_root() / "checkpoints"
    with _removed_unless(case, folder, keep=keep or checkpoint_path(case.spec, folder).exists()):
        console.print(f"{case.name}:", highlight=False)
        return run(case, folder, rounds, done=_say)


@contextmanager
def _removed_unless(case: Case, folder: Path, *, keep: bool) -> Iterator[None]:
    try:
        yield
    finally:
        if not keep:
            remove(case, folder)


def _say(run: Run) -> None:
    seconds = f"{run.seconds:6.2f} s ({run.cpu_seconds:6.2f} s of processors)"
    console.print(f"  {run.contender:15} {seconds}  peak +{bytes_text(run.peak)}", highlight=False)


_HEADINGS = (
    "checkpoint",
    "",
    "seconds",
    "min to max",
    "processor s",
    "peak",
    "/ model",
    "peak / stock",
    "time / stock",
    "time / bf16",
    "processor / bf16",
    "+ µs / tensor",
)


def _table(results: list[CaseResult], rounds: int) -> Table:
    table = Table(title=f"medians of {rounds} alternating runs; ratios are medians of the rounds' own")
    for number, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for result in results:
        _add_rows(table, result)
    return table


def _plain_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table()
    for heading in columns:
        table.add_column(heading.removesuffix(":"), justify="right" if heading.endswith(":") else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _add_rows(table: Table, result: CaseResult) -> None:
    runs = result.runs
    for number, (name, found) in enumerate(figures(runs).items()):
        low, high = found.seconds_range
        table.add_row(
            "" if number else result.case.name,
            name,
            f"{found.seconds:.2f}",
            f"{low:.2f} to {high:.2f}",
            f"{found.cpu_seconds:.2f}",
            bytes_text(found.peak),
            f"{found.peak_of_final:.3f}",
            f"{ratio(runs, name, STOCK.name, 'peak'):.2f}",
            f"{ratio(runs, name, STOCK.name, 'seconds'):.2f}",
            f"{ratio(runs, name, BF16.name, 'seconds'):.2f}",
            f"{ratio(runs, name, BF16.name, 'cpu_seconds'):.2f}",
            f"{added_seconds_a_tensor(result, name, BF16.name) * 1e6:.0f}",
            end_section=number == len(figures(runs)) - 1,
        )


if __name__ == "__main__":
    main()
