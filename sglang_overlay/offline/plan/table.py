# SPDX-License-Identifier: Apache-2.0
"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from sglang_overlay.observe.formats import bytes_text, count_text
from sglang_overlay.offline.plan.planner import DEGREES
from sglang_overlay.offline.plan.timeline import LABELS

if TYPE_CHECKING:
    from rich.console import Console

    from sglang_overlay.offline.plan.gpus import GPU
    from sglang_overlay.offline.plan.job import Mode, PlannedLoad, Serving
    from sglang_overlay.offline.plan.planner import Fit, Plan

NOT_COUNTED = "Weights while loading, and nothing else: no KV cache, activations, CUDA graphs, CUDA context or NCCL."


def print_plan(out: Console, plan: Plan, gpu: GPU | None) -> None:
    """Print what is planned, a row for each computed rank and mode, what the figures leave out, and the verdict."""
    _print_subject(out, plan)
    table = Table(header_style="dim", box=None, pad_edge=False)
    for heading in ("rank", "mode"):
        table.add_column(heading, no_wrap=True)
    for heading in ("peak", "model", "peak/model", "staging", "units", "deferred", "fell back"):
        table.add_column(heading, justify="right", no_wrap=True)
    if gpu is not None:
        table.add_column(f"fits {gpu.name}", no_wrap=True)
    for rank in plan.ranks:
        for load in rank.loads:
            table.add_row(_ranks_text(rank.stands_for), *_cells(load), *_fits(load, gpu))
    out.print(table)
    _print_notes(out, plan)
    if gpu is not None:
        _print_verdict(out, plan, gpu)


def _print_subject(out: Console, plan: Plan) -> None:
    load, request = plan.ranks[0].loads[0], plan.request
    layout = request.layout
    sizes = " ".join(f"{name}={size}" for name, size in (("TP", layout.tp), ("EP", layout.ep), ("PP", layout.pp)))
    billions = f"{load.checkpoint_parameters / 1e9:.2f} B parameters"
    files = count_text(load.checkpoint_files, "file")
    name = request.model.stem if request.model.suffix == ".json" else request.model.name
    out.print(f"[bold]{escape(name)}[/bold] ({load.architecture}), SGLang {plan.release}, {sizes}", soft_wrap=True)
    out.print(
        f"{billions}, {bytes_text(load.checkpoint_bytes)} in {files} read {request.order}; from "
        f"{escape(load.checkpoint_source)}; device {request.device}\n",
        soft_wrap=True,
    )
    if not request.schemes.is_stock:
        names = ", ".join(sorted(request.schemes.names))
        out.print(f"Quantization schemes: {escape(names)}; stock SGLang is planned with its own.\n", soft_wrap=True)


def _cells(load: PlannedLoad) -> list[str]:
    return [
        LABELS[load.mode],
        bytes_text(load.peak),
        bytes_text(load.final),
        f"{load.peak / load.final:.3f}x",
        "" if load.mode == "stock" else bytes_text(load.staging_peak),
        str(load.units or ""),
        str(load.deferred or ""),
        str(load.fallback or ""),
    ]


def _fits(load: PlannedLoad, gpu: GPU | None) -> list[str]:
    if gpu is None:
        return []
    return ["[green]yes[/green]" if load.peak <= gpu.usable else "[red]no[/red]"]


def _ranks_text(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


def _print_notes(out: Console, plan: Plan) -> None:
    out.print()
    if any(len(rank.stands_for) > 1 for rank in plan.ranks):
        out.print("Ranks of a pipeline stage hold equal shapes, so the first was computed for all (--every-rank).")
    for mode in plan.request.modes:
        why = plan.highest(mode).why_none
        if why is not None and mode != "stock":
            out.print(f"{LABELS[mode]}: the whole model is loaded as in stock SGLang: {escape(why)}.", soft_wrap=True)
    _print_host(out, plan)
    out.print(NOT_COUNTED)


def _print_host(out: Console, plan: Plan) -> None:
    """Host memory for reading: independent of the rank, except for the files' order; one mode keeps what it reads."""
    load = max((rank.loads[-1] for rank in plan.ranks), key=lambda load: load.host.unmapped)
    out.print(
        f"Host memory of each rank for what it reads, beside the page cache: none where safetensors files are mapped; "
        f"up to {bytes_text(load.host.unmapped)} with --weight-loader-disable-mmap; {bytes_text(load.host.pickled)} "
        "from .bin files, all of which SGLang keeps.",
        soft_wrap=True,
    )
    if load.host.held >= load.checkpoint_bytes:
        out.print(
            "This model's loader collects the whole checkpoint before it loads a weight: formats that read to the GPU "
            f"(fastsafetensors, instanttensor) need {bytes_text(load.checkpoint_bytes)} more there.",
            soft_wrap=True,
        )
    elif "complete_layers" in plan.request.modes:
        held = max(load.host.held for rank in plan.ranks for load in rank.loads if load.mode == "complete_layers")
        out.print(
            f"{LABELS['complete_layers']}: {bytes_text(held)} of tensors wait for the rest of their layers, in host "
            "memory where files are not mapped.",
            soft_wrap=True,
        )


def _print_verdict(out: Console, plan: Plan, gpu: GPU) -> None:
    room = f"{gpu.name}: {bytes_text(gpu.memory)}, of which {bytes_text(gpu.usable)} for weights"
    for mode in plan.request.modes:
        fits = plan.fits(mode, gpu)
        verdict = "[red]does not load[/red]"
        if fits:
            verdict = f"[green]loads[/green] {_served_text(plan, mode, gpu)}"
        out.print(f"{room}; {LABELS[mode]} {verdict}", soft_wrap=True)


def print_fits(out: Console, model: str, found: Sequence[Fit]) -> None:
    """Print a row for each GPU, with a column for each mode."""
    modes = list(dict.fromkeys(fit.mode for fit in found))
    longest = max((fit.serving.context_length for fit in found if fit.serving), default=None)
    request = "one request of the longest context" if longest is None else f"a request of {longest:,} tokens"
    out.print(f"[bold]{escape(model)}[/bold]: fewest tensor-parallel ranks that load it and serve {request}\n")
    table = Table(header_style="dim", box=None, pad_edge=False)
    for heading in ("GPU", *(LABELS[mode] for mode in modes)):
        table.add_column(heading, no_wrap=True)
    by_gpu: dict[str, list[str]] = {}
    for fit in found:
        by_gpu.setdefault(fit.gpu.name, []).append(_fit_text(fit))
    for gpu, cells in by_gpu.items():
        table.add_row(gpu, *cells)
    out.print(table)


def _fit_text(fit: Fit) -> str:
    if fit.tp is None or fit.serving is None:
        why = f": {fit.serving.why_none}" if fit.serving and fit.serving.why_none else ""
        return f"[red]none up to TP {DEGREES[-1]}[/red]{why}"
    return f"TP {fit.tp}: {fit.serving.tokens:,} tokens"


def _served_text(plan: Plan, mode: Mode, gpu: GPU) -> str:
    serving = plan.serving(mode, gpu)
    if serving is None:
        return f"and leaves {bytes_text(gpu.usable - plan.highest(mode).final)} for KV cache and activations"
    return f"but serves nothing: {serving.why_none}" if serving.why_none else f"and leaves {serving_text(serving)}"


def serving_text(serving: Serving) -> str:
    """How many tokens and requests can be served, and whether the longest request is among them."""
    fraction = f"--mem-fraction-static {serving.mem_fraction_static:g}"
    longest = f"the longest request, {serving.context_length:,} tokens"
    return (
        f"{serving.tokens:,} tokens of KV cache, {serving.requests:,} requests at most ({fraction}; "
        f"{'room for' if serving.serves() else 'too few for'} {longest})"
    )
