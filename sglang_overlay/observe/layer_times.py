# SPDX-License-Identifier: Apache-2.0
"""When the units of each layer were quantized."""

from __future__ import annotations

import time


class LayerTimes:
    """Keeps the times of each layer's first and last unit. Any thread may ``note``."""

    def __init__(self) -> None:
        # Entries are replaced, never modified, so threads need no lock: at worst, of two units that end at the same
        # instant the earlier one counts as last.
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def note(self, layer: str) -> None:
        """A unit of ``layer`` has been quantized."""
        now = time.perf_counter()
        self._first.setdefault(layer, now)
        self._last[layer] = now

    def span(self, layer: str, began: float) -> tuple[float, float]:
        """Seconds from ``began`` (``time.perf_counter``) to the first and the last unit; zeros if there was none."""
        first, last = self._first.get(layer), self._last.get(layer)
        return (0.0, 0.0) if first is None or last is None else (round(first - began, 4), round(last - began, 4))
