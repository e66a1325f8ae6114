# SPDX-License-Identifier: Apache-2.0
"""Read folders of reports: one server's or a fleet's, or two to compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sglang_overlay.observe.chart import Curve
from sglang_overlay.observe.differences import differences
from sglang_overlay.observe.labels import labels_of, model_name
from sglang_overlay.observe.load_metrics import state_of
from sglang_overlay.observe.pairs import stock_first
from sglang_overlay.observe.report import LoadReport, read_tree

Loads = Sequence[LoadReport]


@dataclass(frozen=True)
class Group:
    """Loads that are shown together, from one folder and those below it, or from several.

    Attributes:
        name: the folder, as the user named it; of several, all of them.
        loads: all of them, folder by folder.
        folders: the folder that each one's report lies in.
    """

    name: str
    loads: Loads
    folders: Sequence[str]

    @cached_property
    def labels(self) -> list[str]:
        """A name for each load."""
        return labels_of(self.loads, self.folders)

    def label(self, load: LoadReport) -> str:
        """The name of one of these loads."""
        return next(label for label, one in zip(self.labels, self.loads, strict=True) if one is load)

    @cached_property
    def differences(self) -> list[str]:
        """What differs between loads of the same model."""
        return differences(self.loads, self.folders)


def read_groups(folders: Sequence[Path]) -> list[Group]:
    """All reports in these folders and below: two folders are a group each, stock first; else there is one group.

    Raises:
        ReportError: a folder has none, or one cannot be read.
    """
    groups = [_read(folder) for folder in folders]
    if len(groups) != 2:
        return [_joined(groups)]
    if not stock_first(groups[0].loads, groups[1].loads):
        groups.reverse()
    return groups


def subject(loads: Loads) -> str:
    """A title: what was loaded by which SGLang, such as 'qwen3-moe, SGLang 0.5.23'."""
    models = dict.fromkeys(map(model_name, loads))
    found = dict.fromkeys(load.release for load in loads)
    return f"{', '.join(models)}, SGLang {', '.join(found)}"


def curves(groups: Sequence[Group]) -> list[Curve]:
    """A curve for each mode and role of each group; named by the group too if modes are ambiguous."""
    found: dict[tuple[str, str, str], list[LoadReport]] = {}
    for group in groups:
        for load in group.loads:
            found.setdefault((group.name, load.mode, load.role), []).append(load)
    kinds = [(mode, role) for _, mode, role in found]
    drawn = []
    for (name, mode, role), loads in found.items():
        label = mode if role == "target" else f"{mode}, {role} model"
        drawn.append(Curve(label if kinds.count((mode, role)) == 1 else f"{name} ({label})", tuple(loads)))
    return drawn


def lines(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """Each load for a dashboard: its report without samples and single layers, its folder, and ``streamed_bytes``."""
    for group in groups:
        for load, folder in zip(group.loads, group.folders, strict=True):
            state = state_of(load)
            # The schema of reports requires them.
            state["memory"]["samples"] = []
            yield {**state, "folder": folder}


def _read(folder: Path) -> Group:
    tree = read_tree(folder)
    loads = [load for found in tree.values() for load in found]
    return Group(str(folder), loads, [str(place) for place, found in tree.items() for _ in found])


def _joined(groups: Sequence[Group]) -> Group:
    return Group(
        ", ".join(group.name for group in groups),
        [load for group in groups for load in group.loads],
        [folder for group in groups for folder in group.folders],
    )
