# SPDX-License-Identifier: Apache-2.0
"""``python -m sglang_overlay``, or ``sglang-streamfp8``: is streaming active here, and what did a load cost."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from sglang_overlay import __version__
from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.offline.plan import gpus
from sglang_overlay.offline.plan.job import MODES, ORDERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sglang_overlay.observe.folders import Group

Result = TypeVar("Result")

_CHART = "Needs matplotlib."


def _completes(names: Callable[[], Iterable[str]]) -> Callable[[Any, Any, str], list[str]]:
    """What a shell offers for an option whose values ``names`` lists."""
    return lambda _context, _option, begun: [name for name in names() if name.startswith(begun)]


def _scheme_names() -> Iterable[str]:
    from sglang_overlay.schemes import registry

    return registry.valid_names()


def _release_names() -> Iterable[str]:
    from sglang_overlay.hooks import releases

    return releases.supported()


def _gpu_names() -> Iterable[str]:
    return [gpu.name for gpu in gpus.known()]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="sglang-streamfp8")
def main() -> None:
    """Stream FP8 loading for SGLang: see whether it is active and what your loads cost.

    There is nothing to start: once installed next to SGLang, the server you already run streams.

    \b
    Examples:
      # Is streaming active in this environment? Exit code 0 if so, 1 if not.
      python -m sglang_overlay check
    \b
      # Have a server write a report for each rank, then look at them.
      SGLANG_STREAMFP8_REPORT=reports python -m sglang.launch_server --model-path MODEL --quantization fp8
      python -m sglang_overlay report reports
    \b
      # Compare with stock SGLang, and draw memory over time.
      SGLANG_STREAMFP8=0 SGLANG_STREAMFP8_REPORT=stock python -m sglang.launch_server ...
      python -m sglang_overlay report stock reports --html report.html
    \b
      # Do replicas serve the same weights, after an update for instance?
      python -m sglang_overlay compare http://node-1:30000 http://node-2:30000
    \b
      # Will a model load, and with what peak? No GPU and no weights are needed to know.
      python -m sglang_overlay plan --model-path MODEL --tp 8 --gpu H200
      # Quantize once, for any SGLang.
      python -m sglang_overlay export --model-path MODEL --out MODEL-FP8 --scheme block

    \b
    Exit codes:
      0  done, or yes
      1  no (not active, does not fit), or it failed and the error says what to do
      2  the options are wrong, or a model could not be planned

    Results go to standard output, everything else to standard error. Colour is for terminals, and not where NO_COLOR
    is set. The same command is installed as sglang-streamfp8, which bash, zsh and fish complete:

    \b
      eval "$(_SGLANG_STREAMFP8_COMPLETE=bash_source sglang-streamfp8)"    # or zsh_source, in ~/.bashrc or ~/.zshrc
    """


@main.command(short_help="Is streaming active here?")
@click.option("--verbose", "-v", is_flag=True, help="Describe every hook, not only those that do not fit.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema sglang-streamfp8/check, version 1).")
def check(verbose: bool, as_json: bool) -> None:  # noqa: FBT001 - click passes flags like this
    """Say whether streaming is active, for which SGLang, and whether its hooks are in place.

    Loads SGLang's plugins in this process, as a server would, so it takes as long as importing SGLang does.

    \b
    Exit codes:
      0  an fp8 load would be streamed
      1  it would not, and the problems say why

    \b
    Hook states:
      active     applied in this process
      ready      fits this SGLang, but is not applied
      absent     this SGLang has nothing of the kind; what is lost with it is listed
      missing    SGLang has nothing of that name, or the hook cannot be imported
      signature  SGLang's function takes other parameters than expected

    \b
    Examples:
      python -m sglang_overlay check
      python -m sglang_overlay check --verbose
      python -m sglang_overlay check --json | jq .problems
    """
    from sglang_overlay import activation
    from sglang_overlay.observe import terminal

    with terminal.waiting("Importing SGLang and loading its plugins ..."):
        found = activation.inspect_activation(os.environ)
    if as_json:
        click.echo(json.dumps(activation.to_json(found), indent=2))
    else:
        terminal.print_activation(terminal.console(), found, terminal.every if verbose else terminal.unfit)
    sys.exit(0 if found.active else 1)


@main.command(
    short_help="Start a program that loads no plugins by itself.",
    # What follows MODULE is the module's own, --help included.
    context_settings={"allow_interspersed_args": False},
)
@click.argument("module")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(module: str, arguments: tuple[str, ...]) -> None:
    """Do what `python -m MODULE ARGUMENTS` does, with SGLang's plugins loaded in every process.

    SGLang's servers and Engine need no such help. Its one-batch benchmark does: it loads no plugins. The exit code is
    the program's own, or 1 where there is no such module.

    \b
    Examples:
      python -m sglang_overlay run sglang.benchmark.one_batch --model-path MODEL --quantization fp8
      python -m sglang_overlay run sglang.benchmark.one_batch --help
    """
    from sglang_overlay.hooks import launch

    _or_exit(lambda: launch.check_module(module))
    launch.run(module, arguments)


@main.command(short_help="Put streaming into a source tree of SGLang.")
@click.option(
    "--apply",
    "tree",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A source tree of SGLang: the folder that has python/sglang in it.",
)
@click.option(
    "--release",
    help="Whose series to apply; told from the tree's files unless given.",
    shell_complete=_completes(_release_names),
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema sglang-streamfp8/patch, version 1).")
def patch(tree: Path, release: str | None, as_json: bool) -> None:  # noqa: FBT001
    """Apply the patch series of an SGLang release to a source tree of it.

    An SGLang built from that tree streams fp8 loads without this package.

    \b
    Exit codes:
      0  applied
      1  the series does not fit; nothing was changed

    \b
    Examples:
      python -m sglang_overlay patch --apply sglang
      python -m sglang_overlay patch --apply sglang --release 0.5.23
    """
    from sglang_overlay import patches

    def apply() -> tuple[str, list[Path]]:
        found = release or patches.release_of(tree)
        return found, patches.apply(tree, found)

    applied, files = _or_exit(apply)
    if as_json:
        names = [file.name for file in files]
        about = {"schema": "sglang-streamfp8/patch", "version": 1}
        click.echo(json.dumps({**about, "tree": str(tree), "release": applied, "applied": names}, indent=2))
        return
    for file in files:
        click.echo(f"applied {file.name}")
    click.echo(f"{tree} is SGLang {applied} with streaming fp8 loading built in.")


def _print_schema(context: click.Context, _option: click.Parameter, wanted: bool) -> None:  # noqa: FBT001
    if not wanted:
        return
    from sglang_overlay.observe.report import SCHEMA_FILE

    click.echo(SCHEMA_FILE.read_text(encoding="utf-8"), nl=False)
    context.exit()


@main.command(short_help="What did loads cost?")
@click.argument("folders", metavar="FOLDER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write one page with all of it.")
@click.option(
    "--png", type=click.Path(dir_okay=False, path_type=Path), help=f"Draw memory over time into this file. {_CHART}"
)
@click.option("--json", "as_json", is_flag=True, help="Print the reports and their comparison as JSON.")
@click.option("--jsonl", "as_lines", is_flag=True, help="Print a line of JSON for each load, for a dashboard.")
@click.option(
    "--schema",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_schema,
    help="Print the JSON Schema of a report, and nothing else.",
)
def report(folders: tuple[Path, ...], html: Path | None, png: Path | None, as_json: bool, as_lines: bool) -> None:  # noqa: FBT001
    """Show the load reports in FOLDER and all folders below it: those of one server, or of a fleet.

    A server writes them when SGLANG_STREAMFP8_REPORT names a folder. What differs between ranks, nodes and replicas is
    told first. Two folders are compared: the one with stock loads is what the other is compared with. Three or more
    are shown together. Peaks are above the memory at the start of the load.

    \b
    Exit codes:
      0  shown
      1  there are no reports, or one cannot be read, or a file cannot be written

    \b
    Examples:
      python -m sglang_overlay report reports
      python -m sglang_overlay report reports --html fleet.html
      python -m sglang_overlay report stock reports --html report.html
      python -m sglang_overlay report stock reports --png memory.png
      python -m sglang_overlay report stock reports --json | jq .comparison
      python -m sglang_overlay report reports --jsonl | jq -c '[.folder, .ranks.tp.rank, .seconds]'
      python -m sglang_overlay report --schema > load-report.schema.json
    """
    from sglang_overlay.observe.folders import lines, read_groups

    if as_json and as_lines:
        raise click.UsageError("--json and --jsonl cannot be used together")
    groups = _or_exit(lambda: read_groups(folders))
    if html is not None:
        _or_exit(lambda: _write_page(groups, html))
    if png is not None:
        _or_exit(lambda: _draw(groups, png))
    if as_lines:
        for line in lines(groups):
            click.echo(json.dumps(line))
        return
    if as_json:
        click.echo(json.dumps(_as_json(groups), indent=2))
        return
    _print(groups)
    for what, file in (("page", html), ("memory over time", png)):
        if file is not None:
            click.echo(f"\n{what}: {file}")


@main.command("compare", short_help="Do replicas serve the same weights?")
@click.argument("urls", metavar="URL...", nargs=-1, required=True)
@click.option("--api-key", help="Key of the servers, if they ask for one; the admin key if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema sglang-streamfp8/compare, version 1).")
def compare_command(urls: tuple[str, ...], api_key: str | None, as_json: bool) -> None:  # noqa: FBT001
    """Compare what running servers serve, rank by rank, and name the ranks and layers that differ.

    Each rank computes a checksum of all its weights, on its device, between two batches. One URL is enough if the
    server has several data-parallel replicas.

    \b
    Exit codes:
      0  all serve the same
      1  they do not, or a server could not be asked

    \b
    Examples:
      python -m sglang_overlay compare http://node-1:30000 http://node-2:30000
      python -m sglang_overlay compare http://node-1:30000 http://node-2:30000 --json | jq .ranks
    """
    from concurrent.futures import ThreadPoolExecutor

    from sglang_overlay.observe import replicas

    def found() -> list[replicas.RankComparison]:
        with ThreadPoolExecutor(len(urls)) as threads:
            asked = threads.map(lambda url: replicas.ask(url, api_key), urls)
            return replicas.compare([replica for of_one_server in asked for replica in of_one_server])

    ranks = _or_exit(found)
    if any(len(rank.checksums) < 2 for rank in ranks):
        raise click.UsageError("there is one replica: name another.")
    if as_json:
        click.echo(json.dumps(replicas.to_json(ranks), indent=2))
    else:
        click.echo("\n".join(line for rank in ranks for line in replicas.lines(rank)))
    sys.exit(0 if all(rank.is_equal for rank in ranks) else 1)


def _refuse_options_that_fits_ignores(context: click.Context) -> None:
    """``plan --fits`` tries tensor-parallel degrees on GPUs: options that say otherwise would be ignored."""
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name in ("tp", "ep", "pp", "dp", "dp_attention", "every_rank", "device", "png"):
            raise click.UsageError(f"--fits tries tensor-parallel degrees on GPUs itself: leave out {option.opts[0]}")


@main.command("plan", short_help="Will a model load, and with what peak?")
@click.option(
    "--model-path",
    "model",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of a checkpoint, a config.json, or a name on the hub that is in this machine's cache.",
)
@click.option("--tp", "--tp-size", default=1, show_default=True, type=click.IntRange(1), help="Tensor-parallel ranks.")
@click.option("--ep", "--ep-size", default=1, show_default=True, type=click.IntRange(1), help="Expert-parallel ranks.")
@click.option("--pp", "--pp-size", default=1, show_default=True, type=click.IntRange(1), help="Pipeline stages.")
@click.option(
    "--dp",
    "--dp-size",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Data-parallel ranks, with --enable-dp-attention.",
)
@click.option("--enable-dp-attention", "dp_attention", is_flag=True, help="Attention is data-parallel.")
@click.option(
    "--order",
    default="sorted",
    show_default=True,
    type=click.Choice(ORDERS),
    help="Order of files: sorted (SGLang's default), staggered (SGLANG_SORT_WEIGHT_FILES=1), shuffled.",
)
@click.option(
    "--mode",
    "modes",
    multiple=True,
    type=click.Choice(MODES),
    help="Only this way of loading; repeatable. stock: quantized after loading; layers: each when it is complete; "
    "complete_layers: the same, on the device only then; streaming: this package.",
)
@click.option(
    "--device",
    default="cuda",
    show_default=True,
    type=click.Choice(["cuda", "cpu"]),
    help="Count GPU memory, or what a process on the CPU would hold.",
)
@click.option(
    "--gpu",
    "gpu_name",
    help=f"Say whether it fits this GPU, and how much it then serves: {', '.join(_gpu_names())}.",
    shell_complete=_completes(_gpu_names),
)
@click.option(
    "--fits",
    is_flag=True,
    help="List the fewest tensor-parallel ranks of each GPU that load it and serve its longest request.",
)
@click.option("--context-length", type=click.IntRange(1), help="As the server's: tokens of the longest request.")
@click.option("--max-running-requests", type=click.IntRange(1), help="As the server's.")
@click.option("--mem-fraction-static", type=click.FloatRange(0, 1), help="As the server's; SGLang's own for the GPU.")
@click.option("--kv-cache-dtype", help="As the server's: auto, fp8_e4m3, ...")
@click.option("--every-rank", is_flag=True, help="Compute each rank, not one for each pipeline stage.")
@click.option("--from-config", is_flag=True, help="Take names and shapes from config.json although there are headers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema sglang-streamfp8/plan, version 1).")
@click.option("--png", type=click.Path(path_type=Path), help=f"Draw memory over bytes read into this file. {_CHART}")
def plan_command(
    gpu_name: str | None,
    fits: bool,  # noqa: FBT001
    as_json: bool,  # noqa: FBT001
    png: Path | None,
    context_length: int | None,
    max_running_requests: int | None,
    mem_fraction_static: float | None,
    kv_cache_dtype: str | None,
    **asked: Any,
) -> None:
    """Work out what memory loading a model with --quantization fp8 takes, without a GPU and without its weights.

    SGLang's own model is built for each rank and its own loader run over the headers of the checkpoint, on tensors
    without memory. Where there are no *.safetensors files, names and shapes come from config.json alone.

    \b
    Exit codes:
      0  planned, and it fits the GPU if one was named (of the modes asked for: streaming, else the last)
      1  it does not fit
      2  it could not be planned

    \b
    Examples:
      python -m sglang_overlay plan --model-path MODEL --tp 8 --gpu H200
      python -m sglang_overlay plan --model-path MODEL --fits --context-length 131072
      python -m sglang_overlay plan --model-path config.json --tp 8 --ep 8 --order shuffled --png plan.png
      python -m sglang_overlay plan --model-path MODEL --json | jq '.ranks[0].loads.streaming.peak_bytes'
    """
    from sglang_overlay.offline.plan import command

    asked["served"] = {
        "context_length": context_length,
        "max_running_requests": max_running_requests,
        "mem_fraction_static": mem_fraction_static,
        "kv_cache_dtype": kv_cache_dtype,
    }
    if fits:
        _refuse_options_that_fits_ignores(click.get_current_context())
    try:
        if fits:
            sys.exit(command.run_fits(asked, gpu_name, as_json=as_json))
        sys.exit(command.run(asked, gpu_name, png, command.JSON if as_json else command.TABLE))
    except StreamFP8Error as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)


@main.command("export", short_help="Write an fp8 checkpoint that stock SGLang loads.")
@click.option(
    "--model-path",
    "source",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of a bf16 checkpoint.",
)
@click.option("--out", "target", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--scheme",
    required=True,
    help="block or channel, or JSON as in SGLANG_STREAMFP8_SCHEME.",
    shell_complete=_completes(_scheme_names),
)
@click.option("--max-shard-gb", "most", default=5.0, show_default=True, help="Size of a file, in GB.")
@click.option("--trust-remote-code", is_flag=True, help="As SGLang's option of that name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON (schema sglang-streamfp8/export, version 1).")
def export_command(scheme: str, most: float, as_json: bool, **asked: Any) -> None:  # noqa: FBT001
    """Quantize a bf16 checkpoint once, on the CPU, into an fp8 checkpoint that SGLang, vLLM and transformers load.

    Stock SGLang then serves the same weights as an online load with this scheme, bit for bit. A GPU is not needed, nor
    memory for the model. An export that was interrupted goes on where it stopped when it is started again.

    \b
    Exit codes:
      0  written
      1  it cannot be exported, or not to that folder; an interrupted export is kept, and goes on at the next start

    \b
    Examples:
      python -m sglang_overlay export --model-path MODEL --out MODEL-FP8 --scheme block
      python -m sglang_overlay export --model-path MODEL --out MODEL-FP8 \\
          --scheme '{"linear": "block", "moe": "block", "ignore": ["re:.*layers.0.*"]}'
    """
    from sglang_overlay.offline.export import command

    made = _or_exit(lambda: command.run(scheme=scheme, most=int(most * 1e9), **asked))
    if as_json:
        click.echo(json.dumps(command.to_json(asked["target"], made), indent=2))
    else:
        click.echo(command.summary(asked["target"], made), err=True)


def _or_exit(work: Callable[[], Result]) -> Result:
    try:
        return work()
    except StreamFP8Error as error:
        raise click.ClickException(str(error)) from error


def _print(groups: list[Group]) -> None:
    from sglang_overlay.observe import terminal

    out = terminal.console()
    for index, group in enumerate(groups):
        if index:
            out.print()
        terminal.print_reports(out, group)
    if len(groups) == 2:
        out.print()
        terminal.print_comparison(out, groups[0], groups[1])


def _as_json(groups: list[Group]) -> dict[str, Any]:
    from dataclasses import asdict

    from sglang_overlay.observe.pairs import pair_up
    from sglang_overlay.observe.report import to_json

    pairs = pair_up(groups[0].loads, groups[1].loads) if len(groups) == 2 else []
    return {
        "schema": "sglang-streamfp8/reports",
        "version": 1,
        "folders": [
            {
                "folder": group.name,
                "differences": group.differences,
                "reports": [
                    {**to_json(load), "folder": folder} for load, folder in zip(group.loads, group.folders, strict=True)
                ],
            }
            for group in groups
        ],
        "comparison": [
            {
                "ranks": asdict(pair.first.ranks),
                "role": pair.first.role,
                "seconds_ratio": pair.seconds_ratio,
                "peak_ratio": pair.peak_ratio,
            }
            for pair in pairs
        ],
    }


def _draw(groups: list[Group], file: Path) -> Path:
    from sglang_overlay.observe import chart
    from sglang_overlay.observe.folders import curves, subject

    return chart.draw(curves(groups), file, f"Memory while loading {subject(groups[0].loads)}")


def _write_page(groups: list[Group], file: Path) -> Path:
    from sglang_overlay.observe import page

    return page.write(groups, file)
