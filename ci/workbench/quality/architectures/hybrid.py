"""Language models with linear attention, state spaces or sparse attention beside, or in place of, attention."""

from __future__ import annotations

from workbench.quality.published import Published

ARCHITECTURES: dict[str, Published] = {}
