"""The architectures that SGLang registers, read from its source: on a machine without a GPU not all can be imported."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path


@cache
def registered() -> tuple[str, ...]:
    """Names in every ``EntryClass`` under SGLang's ``srt/models``, sorted."""
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.submodule_search_locations
    models = Path(spec.submodule_search_locations[0]) / "srt" / "models"
    return tuple(sorted({name for file in models.rglob("*.py") for name in _entries(file)}))


def _entries(file: Path) -> Iterator[str]:
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "EntryClass" for target in node.targets):
            entries = node.value.elts if isinstance(node.value, (ast.List, ast.Tuple)) else [node.value]
            yield from (entry.id for entry in entries if isinstance(entry, ast.Name))
