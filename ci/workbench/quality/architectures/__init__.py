"""The architectures whose tiny checkpoints are made from SGLang's own model, as data: :class:`published.Published`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping

from workbench.quality.published import Published


def _read() -> dict[str, Published]:
    found: dict[str, Published] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        entries: Mapping[str, Published] = importlib.import_module(module.name).ARCHITECTURES
        twice = found.keys() & entries.keys()
        if twice:
            raise ValueError(f"{module.name} has entries that another module has too: {sorted(twice)}")
        found.update(entries)
    return found


PUBLISHED: Mapping[str, Published] = _read()
"""Architecture -> what its published checkpoints look like."""
