# SPDX-License-Identifier: Apache-2.0
"""Which module imports which: never in a circle, wherever in a module the import stands."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sglang_overlay"


def test_no_modules_import_one_another():
    imports = imports_of(PACKAGE)
    assert len(imports) > 100
    assert sum(map(len, imports.values())) > 300
    TopologicalSorter(imports).prepare()


def test_import_within_a_function_counts_and_one_for_annotations_does_not(tmp_path):
    package = tmp_path / "house"
    package.mkdir()
    (package / "attic.py").write_text("if TYPE_CHECKING:\n    from house import cellar\n")
    (package / "cellar.py").write_text("def climb():\n    from house.attic import ladder\n")
    assert imports_of(package) == {"house.attic": set(), "house.cellar": {"house.attic"}}
    (package / "attic.py").write_text("def descend():\n    import house.cellar\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imports_of(package)).prepare()


def imports_of(package):
    """For each module of a package, by its dotted name, those of the same package that it imports."""
    files = {".".join(file.relative_to(package.parent).with_suffix("").parts): file for file in package.rglob("*.py")}
    modules = {
        name.removesuffix(".__init__"): ast.parse(file.read_text(encoding="utf-8")) for name, file in files.items()
    }
    return {name: {target for target in _imported(tree) if target in modules} for name, tree in modules.items()}


def _imported(tree):
    """Dotted names of all that may be a module that is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from _imported(node)
