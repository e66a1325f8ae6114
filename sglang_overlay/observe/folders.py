# SPDX-License-Identifier: Apache-2.0
"""Read folders of reports: one, or two to compare."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from sglang_overlay.observe.chart import Curve
from sglang_overlay.observe.compare import stock_first
from sglang_overlay.observe.report import LoadReport, read_folder

Loads = Sequence[LoadReport]
Named = tuple[str, Loads]
"""A folder, as the user named it, and the loads in it."""


def read_folders(folders: Iterable[Path]) -> list[Named]:
    """All reports; of two folders, the one with stock loads comes first.

    Raises:
        ReportError: there are none, or one cannot be read.
    """
    named: list[Named] = [(str(folder), read_folder(folder)) for folder in folders]
    if len(named) == 2 and not stock_first(named[0][1], named[1][1]):
        named.reverse()
    return named


def subject(loads: Loads) -> str:
    """A title: what was loaded by which SGLang, such as 'qwen3-moe, SGLang 0.5.23'."""
    models = dict.fromkeys(Path(load.model_path).name for load in loads)
    found = dict.fromkeys(load.release for load in loads)
    return f"{', '.join(models)}, SGLang {', '.join(found)}"


def curves(named: Sequence[Named]) -> list[Curve]:
    """A curve for each mode and role of each folder; named by the folder too if modes are ambiguous."""
    groups: dict[tuple[str, str, str], list[LoadReport]] = {}
    for name, loads in named:
        for load in loads:
            groups.setdefault((name, load.mode, load.role), []).append(load)
    kinds = [(mode, role) for _, mode, role in groups]
    found = []
    for (name, mode, role), loads in groups.items():
        label = mode if role == "target" else f"{mode}, {role} model"
        found.append(Curve(label if kinds.count((mode, role)) == 1 else f"{name} ({label})", tuple(loads)))
    return found
