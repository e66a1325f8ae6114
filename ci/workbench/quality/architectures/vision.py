"""Models that see or hear."""

from __future__ import annotations

from workbench.quality.published import Published

ARCHITECTURES: dict[str, Published] = {}
