# SPDX-License-Identifier: Apache-2.0
"""What became of each layer, all ranks of a load together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from sglang_overlay.observe.report import LoadReport


@dataclass
class Layer:
    """One layer.

    Attributes:
        name: in the model.
        path: how it was loaded: streamed, deferred or fell back.
        reason: why it was not streamed.
        ranks: how many loads it was part of.
        units: on all of them; so are ``direct`` and ``bytes``.
        first_seconds: when its first unit was quantized, on any of them; likewise ``last_seconds``.
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
    """Every layer that fp8 applies to: first those that fell back, then those that were deferred, then the others."""
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
    """Layers that were not streamed, by why not."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.reason:
            found.setdefault(layer.reason, []).append(layer)
    return found
