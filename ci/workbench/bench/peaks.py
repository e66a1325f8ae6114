"""Each supported release, as overlay and with its patch series: bit identity with stock, and peak memory.

    ci/peaks                    measures all releases, about two minutes each
    ci/peaks --release 0.5.19   measures this one anew; what is known of the others is kept

Figures are kept in docs/peaks.json, and README.md's table is made of them. A release is measured in its own
environment, by a process of its own that prints JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import click

from sglang_overlay.hooks import built_in
from workbench.bench import page_tables
from workbench.bench.page_tables import README
from workbench.loads.checkpoints import CheckpointSpec, build
from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadFailed, LoadWorkers, compare
from workbench.releases import environment

Form = Literal["overlay", "patches"]
Data = dict[str, dict[Form, list["Peak"]]]
"""Known figures by release, oldest first."""

FORMS: tuple[Form, ...] = ("overlay", "patches")
SPECS = tuple(CheckpointSpec(family, size="bench_2g", files=4) for family in ("qwen3_moe", "deepseek_v3"))
TITLES = {"qwen3_moe": "Qwen3-MoE", "deepseek_v3": "DeepSeek-V3"}
DATA = environment.CLONE / "docs" / "peaks.json"


@dataclass(frozen=True)
class Peak:
    """Stock and streaming load of one model.

    Args:
        model: family of the checkpoint.
        of_model: streaming's peak above start / bytes of the loaded model.
        of_stock: the same / stock's peak above start.
        is_identical: whether both hold the same tensors, bit for bit.
    """

    model: str
    of_model: float
    of_stock: float
    is_identical: bool


def measure(spec: CheckpointSpec, folder: Path) -> Peak:
    """Load a checkpoint twice with the SGLang that is installed.

    Raises:
        LoadFailed: a load failed, or was not streamed.
    """
    path = build(spec, folder)
    with tempfile.TemporaryDirectory() as logs, LoadWorkers(Path(logs)) as workers:
        stock = workers.load_fresh(LoadJob(path, streaming="0"))
        # An SGLang with the patch series has no "require", but logs that it streamed, like the overlay.
        streaming = workers.load_fresh(LoadJob(path, streaming="1" if built_in.streams_itself() else "require"))
    if not any("StreamFP8" in line for line in streaming.log) or any("StreamFP8" in line for line in stock.log):
        raise LoadFailed("stock streamed, or streaming did not:\n" + "\n".join([*stock.log, *streaming.log]))
    (before,), (after,) = stock.ranks, streaming.ranks
    peak = after.memory.peak_above_start
    return Peak(
        spec.family,
        round(peak / after.model_bytes, 3),
        round(peak / before.memory.peak_above_start, 3),
        not compare(stock, streaming),
    )


def measured(release: str, form: Form, folder: Path) -> list[Peak]:
    """Run `measure` for all models in a release's own environment.

    Raises:
        click.ClickException: it failed; the message has its output.
    """
    python = environment.ensure(environment.planned(release))
    environ = {**os.environ, "PYTHONPATH": str(environment.CLONE / "ci")}
    if form == "patches":
        environ = with_patches(python, release, environ)
    command = [str(python), "-P", "-m", "workbench.bench.peaks", "measure", str(folder)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(f"{release}, {form}, exit code {done.returncode}:\n{done.stderr[-4000:]}")
    return [Peak(**peak) for peak in json.loads(done.stdout.splitlines()[-1])]


def with_patches(python: Path, release: str, environ: Mapping[str, str]) -> dict[str, str]:
    """Environment variables with which a release's interpreter runs the patched release, without the overlay."""
    command = [str(python), "-P", "-m", "workbench.releases.patched", release]
    done = subprocess.run(command, env=dict(environ), stdout=subprocess.PIPE, text=True, check=True)
    return {**environ, **dict(line.split("=", 1) for line in done.stdout.splitlines())}


def with_table(page: str, data: Data) -> str:
    """The page with its table replaced: a row for each release, a column for each form and model.

    Raises:
        ValueError: the page has no place for it.
    """
    columns = [f"{form}, {title}" for form in FORMS for title in TITLES.values()]
    rows = [[release, *_cells(data[release])] for release in reversed(data)]
    return page_tables.with_table(page, "ci/peaks", ["SGLang", *columns], rows)


def _cells(forms: Mapping[Form, Sequence[Peak]]) -> Iterator[str]:
    for form in FORMS:
        found = {peak.model: peak for peak in forms.get(form, ())}
        yield from (_cell(found[model]) if model in found else "not measured" for model in TITLES)


def _cell(peak: Peak) -> str:
    return f"{peak.of_model:.2f} ({peak.of_stock:.2f})" + ("" if peak.is_identical else ", differs from stock")


def read(file: Path) -> Data:
    """The recorded figures; empty if there is no file yet."""
    stored = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {
        release: {form: [Peak(**peak) for peak in peaks] for form, peaks in forms.items()}
        for release, forms in stored.items()
    }


def keep(data: Data) -> None:
    """Write the data and the page's table."""
    DATA.write_text(json.dumps(data, indent=1, default=asdict) + "\n", encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), data), encoding="utf-8")


@click.group(invoke_without_command=True, help=__doc__)
@click.option("--release", "wanted", multiple=True, help="A supported release; can be given several times.")
@click.pass_context
def main(context: click.Context, wanted: tuple[str, ...]) -> None:
    """Measure, keep, and write the page."""
    if context.invoked_subcommand is not None:
        return
    supported = environment.supported()
    unknown = [name for name in wanted if name not in supported]
    if unknown:
        raise click.BadParameter(f"{unknown[0]} is not supported; these are: {', '.join(supported)}")
    data = read(DATA)
    with tempfile.TemporaryDirectory() as folder:
        for release in wanted or supported:
            data[release] = {form: _announced(release, form, Path(folder)) for form in FORMS}
            data = {name: data[name] for name in supported if name in data}
            keep(data)
    differing = {name for name, forms in data.items() for peaks in forms.values() for p in peaks if not p.is_identical}
    if differing:
        raise click.ClickException(f"not bit-identical to stock: {', '.join(sorted(differing))}")


def _announced(release: str, form: Form, folder: Path) -> list[Peak]:
    found = measured(release, form, folder)
    for peak in found:
        click.echo(f"{release}, {form}: {peak}")
    return found


@main.command("measure", hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
def measure_all(folder: Path) -> None:
    """Measure with this environment's SGLang, and print the results as JSON."""
    click.echo(json.dumps([asdict(measure(spec, folder)) for spec in SPECS]))


if __name__ == "__main__":
    sys.exit(main())
