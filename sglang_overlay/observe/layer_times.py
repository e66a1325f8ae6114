# SPDX-License-Identifier: Apache-2.0
"""When the units of each layer were quantized."""

from __future__ import annotations

import time


class LayerTimes:
    """Takes the time of every unit, and keeps the first and the last of a layer. Any thread may ``note``."""

    def __init__(self) -> None:
        # Whole entries are replaced and never changed, so threads need no lock: at worst the last of two units that
        # end in the same instant is the earlier one.
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def note(self, layer: str) -> None:
        """A unit of ``layer`` has been quantized."""
        now = time.perf_counter()
        self._first.setdefault(layer, now)
        self._last[layer] = now

    def span(self, layer: str, began: float) -> tuple[float, float]:
        """Seconds from ``began`` (of ``time.perf_counter``) to the first and the last unit; zeros where none was."""
        first, last = self._first.get(layer), self._last.get(layer)
        return (0.0, 0.0) if first is None or last is None else (round(first - began, 4), round(last - began, 4))
