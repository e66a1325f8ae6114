"""The table of docs/patches.md: what each patch adds in each release, and how the series loads beside the overlay.

    ci/series_table                     measures all releases, some minutes each
    ci/series_table --release 0.5.19    measures this one anew; what is known of the others is kept
    ci/series_table --render            writes the table from the series and what is known; measures nothing
    ci/series_table --check             fails where the table is not what --render would write

Figures are kept in docs/series.json. A series is measured in its release's own environment, without the overlay's
plugin, in turn with the overlay: after one load each that is not counted, since the first load of a process also
imports and compiles, `--rounds` of each. The peak is that of the worst round, the time the median of the ratios.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from workbench.bench import bench, page_tables, peaks
from workbench.bench.measured import MALLOC
from workbench.loads.checkpoints import CheckpointSpec, build
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, compare
from workbench.loads.remote import RemoteWorkers
from workbench.releases import environment, make_patches, series

PAGE = environment.CLONE / "docs" / "patches.md"
DATA = environment.CLONE / "docs" / "series.json"
STALE = f"the table of {PAGE.relative_to(environment.CLONE)} is stale; run ci/series_table --render"


@dataclass(frozen=True)
class Loaded:
    """A release's series with one model.

    Args:
        model: family of the checkpoint.
        gigabytes: of it, in bf16.
        of_model: peak above start / bytes of the loaded model.
        of_overlay: load time / that of the overlay.
        is_identical: whether tensors, generated tokens and logits are those of stock.
        series: the code that was measured, as ``make_patches.fingerprint`` has it.
    """

    model: str
    gigabytes: float
    of_model: float
    of_overlay: float
    is_identical: bool
    series: str


Data = dict[str, list[Loaded]]
"""Known figures by release, oldest first."""


def measured(release: str, gigabytes: float, rounds: int, checkpoints: Path) -> Iterator[Loaded]:
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
    with_series = peaks.with_patches(python, release, plain)
    code = make_patches.fingerprint(make_patches.stored(release))
    with tempfile.TemporaryDirectory() as logs:
        folder = Path(logs)
        for spec in (bench.sized_spec(peak.family, gigabytes) for peak in peaks.SPECS):
            with (
                RemoteWorkers(python, plain, folder / spec.family / "overlay") as overlay,
                RemoteWorkers(python, with_series, folder / spec.family / "series") as patched,
            ):
                found = _compared(overlay, patched, spec, rounds, checkpoints)
            yield Loaded(spec.family, gigabytes, *found, series=code)


def _compared(
    overlay: RemoteWorkers, patched: RemoteWorkers, spec: CheckpointSpec, rounds: int, checkpoints: Path
) -> tuple[float, float, bool]:
    path = build(spec, checkpoints)
    # The series has SGLang's own quantizing functions on the CPU, too.
    as_on_gpu = LoadJob(path, streaming="require", described="sizes", without="all of them", timeout_seconds=900)
    stock = overlay.load(LoadJob(path, streaming="0", prompts=PROMPTS, timeout_seconds=900))
    overlay.load(as_on_gpu)
    found = compare(stock, patched.load(LoadJob(path, prompts=PROMPTS, timeout_seconds=900)))
    for line in found[:10]:
        click.echo(f"{spec.family}: {line}", err=True)
    of_model, of_overlay = [], []
    for _ in range(rounds):
        (other,) = overlay.load(as_on_gpu).ranks
        (own,) = patched.load(LoadJob(path, described="sizes", timeout_seconds=900)).ranks
        of_model.append(own.memory.peak_above_start / own.model_bytes)
        of_overlay.append(own.load_seconds / other.load_seconds)
    return round(max(of_model), 3), round(statistics.median(of_overlay), 2), not found


def with_table(page: str, data: Data) -> str:
    """The page with its table replaced: a row for each release, columns for patches and models.

    Raises:
        ValueError: the page has no place for it.
    """
    header = ["SGLang", *(f"patch {patch.number}" for patch in series.PATCHES), "all", *peaks.TITLES.values()]
    rows = [_row(release, data.get(release, ())) for release in reversed(environment.supported())]
    return page_tables.with_table(page, "ci/series_table", header, rows)


def _row(release: str, loaded: Sequence[Loaded]) -> list[str]:
    files = make_patches.stored(release)
    counts = [(code, other) for _, code, other in make_patches.line_counts(files)]
    found = {each.model: _cell(each, make_patches.fingerprint(files)) for each in loaded}
    lines = [f"{code} + {other}" for code, other in (*counts, tuple(map(sum, zip(*counts, strict=True))))]
    return [release, *lines, *(found.get(model, "not measured") for model in peaks.TITLES)]


def _cell(loaded: Loaded, code: str) -> str:
    same = "identical" if loaded.is_identical else "**differs from stock**"
    earlier = "" if loaded.series == code else " (of an earlier series)"
    return f"{loaded.of_model:.2f}, {same}, {loaded.of_overlay:.2f}{earlier}"


def read(file: Path) -> Data:
    """The recorded figures; empty if there is no file yet."""
    stored: Mapping[str, list[dict[str, object]]] = (
        json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    )
    return {release: [Loaded(**each) for each in loaded] for release, loaded in stored.items()}  # type: ignore[arg-type]


def is_stale() -> bool:
    """Whether the page's table is not that of the stored series and the recorded figures."""
    page = PAGE.read_text(encoding="utf-8")
    return with_table(page, read(DATA)) != page


def render() -> None:
    """Write the page's table."""
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), read(DATA)), encoding="utf-8")


def keep(release: str, loaded: Sequence[Loaded]) -> None:
    """Record a release's figures."""
    data = {**read(DATA), release: loaded}
    kept = {name: [asdict(each) for each in data[name]] for name in environment.supported() if name in data}
    DATA.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


@click.command(help=__doc__)
@click.option("--release", default="all", show_default=True, help="all, or a supported release.")
@click.option("--gigabytes", default=1.0, show_default=True, help="Size of each checkpoint in bf16.")
@click.option("--rounds", default=3, show_default=True, help="Counted loads of each.")
@click.option("--render", "only_renders", is_flag=True, help="Measure nothing.")
@click.option("--check", is_flag=True, help="Measure and write nothing; the exit code is 1 if the table is stale.")
def main(*, release: str, gigabytes: float, rounds: int, only_renders: bool, check: bool) -> None:
    """Measure, keep, and write the table; or check it."""
    if check:
        if is_stale():
            raise click.ClickException(STALE)
        return
    supported = environment.supported()
    if release not in ("all", *supported):
        raise click.BadParameter(f"{release} is not supported; these are: {', '.join(supported)}")
    if not only_renders:
        with tempfile.TemporaryDirectory() as checkpoints:
            for name in supported if release == "all" else [release]:
                loaded = list(measured(name, gigabytes, rounds, Path(checkpoints)))
                keep(name, loaded)
                click.echo("\n".join(f"{name}: {each}" for each in loaded))
    render()


if __name__ == "__main__":
    sys.exit(main())
