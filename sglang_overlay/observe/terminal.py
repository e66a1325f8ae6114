# SPDX-License-Identifier: Apache-2.0
"""Reports and activation as text for a terminal; in colour only if the output is one."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from sglang_overlay.observe.folders import Group, subject
from sglang_overlay.observe.formats import bytes_text, count_text, ratio_text, seconds_text
from sglang_overlay.observe.pairs import pair_up

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from sglang_overlay.activation import Activation, HookLine
    from sglang_overlay.observe.report import LayerNote, LoadReport

    Selection = Callable[[HookLine], bool]

_PIPE_WIDTH = 140
_WIDE = 120
_HEADINGS = (
    "rank",
    "mode",
    "seconds",
    "peak",
    "model",
    "peak/model",
    "staging",
    "units",
    "layers",
    "deferred",
    "fell back",
)
_NAMES_SHOWN = 3
_STATE_STYLE = {"active": "green", "ready": "yellow", "absent": "yellow", "missing": "red", "signature": "red"}
_MODES = {
    "0": "off",
    "1": "on, stock where streaming is not possible",
    "require": "on, an error where it is not possible",
}


def every(_hook: HookLine) -> bool:
    """Selects all hooks to be described."""
    return True


def unfit(hook: HookLine) -> bool:
    """Selects the hooks that have no place in this SGLang."""
    return hook.state not in ("active", "ready")


def console() -> Console:
    """A console on standard output: a terminal at its own width; a pipe or file at a fixed one, without colour."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False)


def waiting(what: str) -> AbstractContextManager[object]:
    """A spinner on standard error while the block runs; nothing if that is not a terminal."""
    return Console(stderr=True).status(what) if sys.stderr.isatty() else nullcontext()


def print_activation(out: Console, found: Activation, described: Selection = unfit) -> None:
    """Print the verdict, then problems, settings, and hooks.

    Args:
        out: where to print.
        found: the result of the check.
        described: selects the hooks that are described, not just counted.
    """
    verdict = "[green]active[/green]" if found.active else "[red]not active[/red]"
    release = f"SGLang {found.release}" if found.release else "no SGLang"
    out.print(f"[bold]StreamFP8 {found.overlay_version}[/bold]: {verdict}, {release}")
    for problem in found.problems:
        out.print(Padding(f"[red]problem[/red]  {escape(problem)}", (0, 0, 0, 2), expand=False))
    out.print(Padding(_facts(found), (1, 0, 0, 2), expand=False))
    _print_hooks(out, "Hooks for streaming", found.streaming, described)
    _print_hooks(out, "Hooks for --quantization fp8_block, fp8_channel and fp8_tensor", found.options, described)
    _print_hooks(out, "Hooks for /metrics and /server_info, which streaming can do without", found.telling, described)
    _print_hooks(out, "Hooks for machines without an accelerator", found.cpu_reference, described)
    out.print("\n[bold]To be switched on by hand[/bold]")
    for note in found.notes:
        out.print(Padding(escape(note), (0, 0, 0, 2), expand=False))
    if found.messages:
        out.print("\n[bold]Said while plugins were loaded[/bold]")
    for message in found.messages:
        out.print(Padding(escape(message), (0, 0, 0, 2), expand=False), style="yellow")


def print_reports(out: Console, group: Group) -> None:
    """Print what differs, then a row for each load, the layers that were not streamed, and the warnings."""
    reports = group.loads
    out.print(f"[bold]{escape(f'{group.name}: {subject(reports)}')}[/bold]", soft_wrap=True)
    for difference in group.differences:
        out.print(Padding(f"[yellow]differs[/yellow]  {escape(difference)}", (0, 0, 0, 2), expand=False))
    rows = [[escape(label), *_cells(report)] for label, report in zip(group.labels, reports, strict=True)]
    if out.width >= _WIDE:
        _print_table(out, _HEADINGS, rows, padding=(0, 1))
    else:
        _print_narrow_table(out, rows)
    for scheme in dict.fromkeys(report.scheme for report in reports if report.scheme != "stock"):
        out.print(Padding(f"scheme  {escape(scheme)}", (0, 0, 0, 2), expand=False))
    _print_notes(out, "deferred", [note for report in reports for note in report.layers.deferred])
    _print_notes(out, "fell back", [note for report in reports for note in report.layers.fallback])
    for warning in dict.fromkeys(warning for report in reports for warning in report.warnings):
        out.print(Padding(f"[yellow]warning[/yellow]  {escape(warning)}", (0, 0, 0, 2), expand=False))


def _print_table(out: Console, headings: Sequence[str], rows: Iterable[Sequence[str]], padding: Any) -> None:
    table = Table(header_style="dim", box=None, pad_edge=False, padding=padding)
    # Names of folders may be long: they are folded, never the figures.
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(heading, no_wrap=True, justify="left" if heading == "mode" else "right")
    for row in rows:
        table.add_row(*row)
    out.print(table)


def _print_narrow_table(out: Console, rows: Sequence[Sequence[str]]) -> None:
    """For 80 columns: headings in two lines, and the mode above the table if it is the same in all rows."""
    headings = [heading.replace("/", "/\n").replace(" ", "\n") for heading in _HEADINGS]
    modes = {row[1] for row in rows}
    if len(modes) == 1:
        out.print(f"[dim]mode[/dim] {modes.pop()}")
        headings, rows = [headings[0], *headings[2:]], [[row[0], *row[2:]] for row in rows]
    _print_table(out, headings, rows, padding=(0, 1, 0, 0))


def print_comparison(out: Console, first: Group, second: Group) -> None:
    """Print seconds and peak of both for each rank, with the ratio of the second to the first."""
    pairs = pair_up(first.loads, second.loads)
    if not pairs:
        out.print("No rank has a load in both folders, so there is nothing to compare.")
        return
    out.print(f"[bold]{escape(second.name)}[/bold] against [bold]{escape(first.name)}[/bold]", soft_wrap=True)
    rows = [
        (
            escape(second.label(pair.second)),
            f"{seconds_text(pair.second.seconds)} / {seconds_text(pair.first.seconds)}",
            ratio_text(pair.seconds_ratio),
            f"{bytes_text(pair.second.memory.peak_above_start)} / {bytes_text(pair.first.memory.peak_above_start)}",
            ratio_text(pair.peak_ratio),
        )
        for pair in pairs
    ]
    _print_table(out, ("rank", "seconds", "ratio", "peak", "ratio"), rows, padding=(0, 1))


def _facts(found: Activation) -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_row("supported releases", ", ".join(found.supported))
    facts.add_row("SGLANG_STREAMFP8", escape(f"{found.mode} ({_MODES[found.mode]})") if found.mode else "invalid")
    facts.add_row("SGLANG_STREAMFP8_REPORT", escape(found.report_folder or "not set: no JSON reports"))
    return facts


def _print_hooks(out: Console, title: str, hooks: Sequence[HookLine], described: Selection) -> None:
    if not hooks:
        return
    states = Counter(hook.state for hook in hooks)
    counted = ", ".join(f"[{_STATE_STYLE[state]}]{count} {state}[/]" for state, count in states.items())
    out.print(f"\n[bold]{title}[/bold]: {counted}")
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for hook in filter(described, hooks):
        table.add_row(f"[{_STATE_STYLE[hook.state]}]{hook.state}[/]", f"{escape(hook.target)} [dim]({hook.kind})[/dim]")
        for label, text in _hook_lines(hook):
            table.add_row("", f"[dim]{label}[/dim] {escape(text)}")
    if table.row_count:
        out.print(Padding(table, (0, 0, 0, 2), expand=False))


def _hook_lines(hook: HookLine) -> list[tuple[str, str]]:
    lines = [
        ("lost:" if hook.state == "absent" else "found:", hook.detail),
        ("why:", hook.why),
        ("related:", ", ".join(hook.related)),
        ("can go when:", hook.remove_when),
    ]
    return [(label, text) for label, text in lines if text]


def _cells(report: LoadReport) -> list[str]:
    streamed = report.mode == "streaming"
    layers = report.layers
    return [
        report.mode,
        seconds_text(report.seconds),
        f"+{bytes_text(report.memory.peak_above_start)}",
        bytes_text(report.final_bytes),
        ratio_text(report.memory.peak_above_start / report.final_bytes if report.final_bytes else None),
        bytes_text(report.staging.peak_bytes) if streamed else "-",
        str(report.units.streamed) if streamed else "-",
        str(layers.streamed) if streamed else "-",
        str(len(layers.deferred)) if streamed else "-",
        str(len(layers.fallback)) if streamed else "-",
    ]


def _print_notes(out: Console, label: str, notes: Iterable[LayerNote]) -> None:
    """Print layers grouped by reason: all 61 layers of a model may share one."""
    by_reason: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for note in notes:
        by_reason[note.reason][note.layer] = None
    for reason, layers in by_reason.items():
        names = ", ".join(list(layers)[:_NAMES_SHOWN]) + (", ..." if len(layers) > _NAMES_SHOWN else "")
        text = f"{label}  {count_text(len(layers), 'layer')}: {reason} ({names})"
        out.print(Padding(escape(text), (0, 0, 0, 2), expand=False))
