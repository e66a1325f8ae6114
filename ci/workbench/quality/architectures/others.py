"""Embedding, reward and classification models, and those that run code of transformers."""

from __future__ import annotations

from workbench.quality.published import Published

ARCHITECTURES: dict[str, Published] = {}
