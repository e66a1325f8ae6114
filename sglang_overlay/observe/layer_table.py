# SPDX-License-Identifier: Apache-2.0
"""How each layer was loaded, over all ranks of a load."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sglang_overlay.observe.report import LoadReport


@dataclass
class Layer:
    """One layer.

    Attributes:
        name: its name in the model.
        path: how it was loaded: streamed, deferred or fell back.
        reason: why it was not streamed.
        ranks: number of loads (ranks) that it was part of.
        units: number of units on all of them; ``direct`` and ``bytes`` are sums as well.
        first_seconds: when its first unit was quantized, on any rank; ``last_seconds``: the last.
    """

    name: str
    path: str
    reason: str = ""
    ranks: int = 0
    units: int = 0
    direct: int = 0
    bytes: int = 0
    first_seconds: float = field(default=float("inf"))
    last_seconds: float = 0.0


def layers_of(loads: Sequence[LoadReport]) -> list[Layer]:
    """Every layer that fp8 applies to: first those that fell back, then the deferred ones, then the streamed ones."""
    found: dict[tuple[str, str], Layer] = {}
    for load in loads:
        for path, notes in (("fell back", load.layers.fallback), ("deferred", load.layers.deferred)):
            for note in notes:
                layer = found.setdefault((note.layer, path), Layer(note.layer, path, note.reason))
                layer.ranks += 1
        for figures in load.layers.figures:
            layer = found.setdefault((figures.layer, "streamed"), Layer(figures.layer, "streamed"))
            layer.ranks += 1
            layer.units += figures.units
            layer.direct += figures.direct
            layer.bytes += figures.bytes
            layer.first_seconds = min(layer.first_seconds, figures.first_seconds)
            layer.last_seconds = max(layer.last_seconds, figures.last_seconds)
    order = ("fell back", "deferred", "streamed")
    return sorted(found.values(), key=lambda layer: order.index(layer.path))


def by_reason(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """Layers that were not streamed, by reason."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.reason:
            found.setdefault(layer.reason, []).append(layer)
    return found
