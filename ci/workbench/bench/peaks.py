"""Each supported release: peak memory and bit identity of the overlay and of the patch series, and the series' lines.

    ci/peaks                    measures all releases, some minutes each
    ci/peaks --release 0.5.19   measures this one anew; what is known of the others is kept
    ci/peaks --render           writes the tables from the series and what is known; measures nothing
    ci/peaks --check            fails where a table is not what --render would write

Figures are kept in docs/peaks.json; docs/releases.md shows the overlay's, docs/patches.md the series'. A release is
measured in its own environment: after one load each that is not counted, since the first load of a process also imports
and compiles, `--rounds` of the overlay, of the overlay as it works on a GPU, and of the series without the overlay, in
turn. Peaks are those of the worst round, the time is the median of the ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from sglang_overlay.hooks import built_in
from workbench.bench import bench, page_tables
from workbench.bench.measured import MALLOC
from workbench.loads.checkpoints import CheckpointSpec, Family, build
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, LoadFailed, compare
from workbench.loads.remote import RemoteWorkers
from workbench.releases import environment, make_patches, series

RELEASES = environment.CLONE / "docs" / "releases.md"
PATCHES = environment.CLONE / "docs" / "patches.md"
DATA = environment.CLONE / "docs" / "peaks.json"
STALE = "the tables of docs/releases.md and docs/patches.md are stale; run ci/peaks --render"
TITLES: dict[Family, str] = {"qwen3_moe": "Qwen3-MoE", "deepseek_v3": "DeepSeek-V3"}
DIFFERS = ", **differs from stock**"


@dataclass(frozen=True)
class Figures:
    """One model with one release.

    Args:
        model: family of the checkpoint.
        gigabytes: of it, in bf16.
        of_model: the overlay's peak above start / bytes of the loaded model.
        of_stock: the same / stock's peak above start.
        is_identical: whether tensors, generated tokens and logits are those of stock.
        series_of_model: the series' peak above start / bytes of the loaded model.
        series_is_identical: whether tensors, generated tokens and logits are those of stock.
        series_time: its load time / that of the overlay as it works on a GPU: with SGLang's own quantizing functions,
            without threads and compiled loops, as the series has it on a CPU, too.
        series: the code that was measured, as ``make_patches.fingerprint`` has it.
    """

    model: str
    gigabytes: float
    of_model: float
    of_stock: float
    is_identical: bool
    series_of_model: float
    series_is_identical: bool
    series_time: float
    series: str


Data = dict[str, list[Figures]]
"""Known figures by release, oldest first."""


def measured(release: str, gigabytes: float, rounds: int, checkpoints: Path) -> Iterator[Figures]:
    """Load each model with a release: stock, overlay and series.

    Args:
        release: a supported one.
        gigabytes: of each checkpoint.
        rounds: counted loads.
        checkpoints: folder for them.

    Raises:
        LoadFailed: a load failed.
    """
    python = environment.ensure(environment.planned(release))
    plain = {**os.environ, **MALLOC, "PYTHONPATH": str(environment.CLONE / "ci")}
    with_series = _with_series(python, release, plain)
    code = make_patches.fingerprint(make_patches.stored(release))
    with tempfile.TemporaryDirectory() as logs:
        folder = Path(logs)
        for spec in (bench.sized_spec(family, gigabytes) for family in TITLES):
            with (
                RemoteWorkers(python, plain, folder / spec.family / "overlay") as overlay,
                RemoteWorkers(python, with_series, folder / spec.family / "series") as patched,
            ):
                found = _compared(overlay, patched, spec, rounds, checkpoints)
            yield Figures(model=spec.family, gigabytes=gigabytes, **found, series=code)


def _with_series(python: Path, release: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables with which a release's interpreter runs the patched release, without the overlay."""
    command = [str(python), "-P", "-m", "workbench.releases.patched", release]
    done = subprocess.run(command, env=dict(environ), stdout=subprocess.PIPE, text=True, check=True)
    return {**environ, **dict(line.split("=", 1) for line in done.stdout.splitlines())}


def _compared(
    overlay: RemoteWorkers, patched: RemoteWorkers, spec: CheckpointSpec, rounds: int, checkpoints: Path
) -> dict[str, Any]:
    path = build(spec, checkpoints)
    asked = LoadJob(path, prompts=PROMPTS, new_tokens=2, timeout_seconds=900)
    stock = overlay.load(replace(asked, streaming="0"))
    streamed, series_streamed = overlay.load(replace(asked, streaming="require")), patched.load(asked)
    if not any(built_in.PACKAGE in line and "Quantized" in line for line in series_streamed.log):
        raise LoadFailed("the series did not stream:\n" + "\n".join(series_streamed.log))
    differing = {name: compare(stock, load) for name, load in (("overlay", streamed), ("series", series_streamed))}
    for name, lines in differing.items():
        for line in lines[:10]:
            click.echo(f"{spec.family}, {name}: {line}", err=True)
    counted = LoadJob(path, streaming="require", described="sizes", timeout_seconds=900)
    (before,) = overlay.load(replace(counted, streaming="0")).ranks
    as_on_gpu = replace(counted, without="all of them")
    overlay.load(as_on_gpu)
    peaks, series_peaks, times = [], [], []
    for _ in range(rounds):
        (own,) = overlay.load(counted).ranks
        (slow,) = overlay.load(as_on_gpu).ranks
        (other,) = patched.load(replace(counted, streaming="1")).ranks
        peaks.append(own.memory.peak_above_start)
        series_peaks.append(other.memory.peak_above_start / other.model_bytes)
        times.append(other.load_seconds / slow.load_seconds)
    return {
        "of_model": round(max(peaks) / own.model_bytes, 3),
        "of_stock": round(max(peaks) / before.memory.peak_above_start, 3),
        "is_identical": not differing["overlay"],
        "series_of_model": round(max(series_peaks), 3),
        "series_is_identical": not differing["series"],
        "series_time": round(statistics.median(times), 2),
    }


def with_overlay_table(page: str, data: Data) -> str:
    """The page with its table replaced: a row for each release, a column for each model.

    Raises:
        ValueError: the page has no place for it.
    """
    cells = {(release, each.model): _overlay_cell(each) for release, figures in data.items() for each in figures}
    rows = [_row_of_models(release, cells) for release in reversed(environment.supported())]
    return page_tables.with_table(page, "ci/peaks", ["SGLang", *TITLES.values()], rows)


def with_series_table(page: str, data: Data) -> str:
    """The page with its table replaced: a row for each release, columns for patches and models.

    Raises:
        ValueError: the page has no place for it.
    """
    header = ["SGLang", *(f"patch {patch.number}" for patch in series.PATCHES), "all", *TITLES.values()]
    rows = []
    for release in reversed(environment.supported()):
        files = make_patches.stored(release)
        counts = [(code, other) for _, code, other in make_patches.line_counts(files)]
        lines = [f"{code} + {other}" for code, other in (*counts, tuple(map(sum, zip(*counts, strict=True))))]
        code = make_patches.fingerprint(files)
        cells = {(release, each.model): _series_cell(each, code) for each in data.get(release, ())}
        release_cell, *models = _row_of_models(release, cells)
        rows.append([release_cell, *lines, *models])
    return page_tables.with_table(page, "ci/peaks", header, rows)


def _row_of_models(release: str, cells: Mapping[tuple[str, str], str]) -> list[str]:
    return [release, *(cells.get((release, model), "not measured") for model in TITLES)]


def _overlay_cell(figures: Figures) -> str:
    return f"{figures.of_model:.2f} ({figures.of_stock:.2f})" + ("" if figures.is_identical else DIFFERS)


def _series_cell(figures: Figures, code: str) -> str:
    same = "" if figures.series_is_identical else DIFFERS
    earlier = "" if figures.series == code else " (of an earlier series)"
    return f"{figures.series_of_model:.2f}, {figures.series_time:.2f}{same}{earlier}"


def pages() -> Iterator[tuple[Path, str, str]]:
    """Each page with a table: its path, its text, and the text that it should have."""
    data = read(DATA)
    for path, with_table in ((RELEASES, with_overlay_table), (PATCHES, with_series_table)):
        page = path.read_text(encoding="utf-8")
        yield path, page, with_table(page, data)


def render() -> None:
    """Write the pages' tables."""
    for path, _, page in pages():
        path.write_text(page, encoding="utf-8")


def read(file: Path) -> Data:
    """The recorded figures; empty if there is no file yet."""
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {release: [Figures(**each) for each in figures] for release, figures in stored.items()}


def keep(release: str, figures: Sequence[Figures]) -> None:
    """Record a release's figures."""
    data = {**read(DATA), release: figures}
    kept = {name: [asdict(each) for each in data[name]] for name in environment.supported() if name in data}
    DATA.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


@click.command(help=__doc__)
@click.option("--release", "releases", multiple=True, help="A supported release; repeatable. All by default.")
@click.option("--gigabytes", default=2.0, show_default=True, help="Size of each checkpoint in bf16.")
@click.option("--rounds", default=3, show_default=True, help="Counted loads of each.")
@click.option("--render", "only_renders", is_flag=True, help="Measure nothing.")
@click.option("--check", is_flag=True, help="Measure and write nothing; the exit code is 1 if a table is stale.")
def main(*, releases: tuple[str, ...], gigabytes: float, rounds: int, only_renders: bool, check: bool) -> None:
    """Measure, keep, and write the tables; or check them.

    Raises:
        click.ClickException: a table is stale, or a load is not bit-identical to stock's.
    """
    if check:
        if any(page != wanted for _, page, wanted in pages()):
            raise click.ClickException(STALE)
        return
    supported = environment.supported()
    for release in releases:
        if release not in supported:
            raise click.BadParameter(f"{release} is not supported; these are: {', '.join(supported)}")
    if not only_renders:
        with tempfile.TemporaryDirectory() as checkpoints:
            for name in releases or supported:
                figures = list(measured(name, gigabytes, rounds, Path(checkpoints)))
                keep(name, figures)
                click.echo("\n".join(f"{name}: {each}" for each in figures))
    render()
    found = read(DATA).items()
    differing = [name for name, models in found if not all(m.is_identical and m.series_is_identical for m in models)]
    if differing:
        raise click.ClickException(f"not bit-identical to stock: {', '.join(differing)}")


if __name__ == "__main__":
    sys.exit(main())
