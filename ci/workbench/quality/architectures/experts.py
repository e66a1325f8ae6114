"""Language models with experts."""

from __future__ import annotations

from workbench.quality.published import Published

ARCHITECTURES: dict[str, Published] = {}
