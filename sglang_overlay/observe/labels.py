# SPDX-License-Identifier: Apache-2.0
"""Short names of loads: a rank's alone, or one that tells it from all others of a fleet."""

from __future__ import annotations

import os.path
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sglang_overlay.observe.report import LoadReport, Ranks, Role


def rank_text(ranks: Ranks, role: Role) -> str:
    """Short name of a load: 'TP1/2', with PP and EP if they are used, and 'draft' for a draft model."""
    kinds = (("TP", ranks.tp), ("PP", ranks.pp), ("EP", ranks.ep))
    parts = [f"{name}{place.rank}/{place.size}" for name, place in kinds if place.size > 1 or name == "TP"]
    return " ".join(parts if role == "target" else [*parts, role])


def model_name(load: LoadReport) -> str:
    """The last part of the model's path, which is the same wherever a node has mounted it."""
    return Path(load.model_path).name


def places_of(loads: Sequence[LoadReport], folders: Sequence[str]) -> list[str]:
    """Where each load ran: its report's folder below the one they all lie in, and its node, as far as these differ."""
    absolute = [os.path.abspath(folder) for folder in folders]  # noqa: PTH100 - links stay as they are named
    common = os.path.commonpath(absolute)
    places = [os.path.relpath(folder, common) if folder != common else "" for folder in absolute]
    nodes = [load.node for load in loads]
    if len(set(zip(places, nodes, strict=True))) > len(set(places)):
        places = ["/".join(filter(None, place)) for place in zip(places, nodes, strict=True)]
    return places


def labels_of(loads: Sequence[LoadReport], folders: Sequence[str]) -> list[str]:
    """A name for each load, such as 'pod-b TP1/8': place and model if they differ, ranks, and '#2' for a second load.

    Args:
        loads: in the order they were written, as far as they are of one rank.
        folders: the folder that each one's report lies in.
    """
    models = [model_name(load) for load in loads]
    shown = models if len(set(models)) > 1 else [""] * len(models)
    parts = zip(places_of(loads, folders), shown, loads, strict=True)
    names = [" ".join(filter(None, (place, model, rank_text(load.ranks, load.role)))) for place, model, load in parts]
    total, seen = Counter(names), Counter[str]()
    for index, name in enumerate(names):
        if total[name] > 1:
            seen[name] += 1
            names[index] = f"{name} #{seen[name]}"
    return names
