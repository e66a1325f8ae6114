# SPDX-License-Identifier: Apache-2.0
"""Which module imports which: downwards and never in a circle, wherever in a module the import stands."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "sglang_overlay"
FLOORS = (
    {"__main__"},
    {"cli", "patches", "quantizing"},
    {"activation"},
    {"cpu_reference"},
    {"offline"},
    {"hooks"},
    {"update"},
    {"load"},
    {"settings"},
    {"schemes"},
    {"observe"},
    {"errors"},
    {"core", "safetensors_format"},
)
"""Folders and modules of the package, the highest first. Each may import of its own floor only itself."""
LEAVES = {"observe": {"errors", "safetensors_format"}}
"""What a folder that nothing else of the package is needed for may import, beside itself."""


@pytest.mark.parametrize("package", [PACKAGE, PACKAGE.parent / "ci" / "workbench"], ids=lambda package: package.name)
def test_no_modules_import_one_another(package):
    imports = imports_of(package)
    assert len(imports) > 60
    assert sum(map(len, imports.values())) > 100
    TopologicalSorter(imports).prepare()


def test_imports_point_downwards():
    imports = imports_of(PACKAGE)
    assert {floor_of(module) for module in imports} == {*range(len(FLOORS))}
    assert [arrow for arrow in arrows(imports) if floor_of(arrow[0]) > floor_of(arrow[1])] == []
    for folder, allowed in LEAVES.items():
        assert [
            arrow for arrow in arrows(imports) if room_of(arrow[0]) == folder and room_of(arrow[1]) not in allowed
        ] == []


def arrows(imports):
    """Imports from one folder into another."""
    pairs = [(module, target) for module, targets in imports.items() for target in sorted(targets)]
    return [pair for pair in pairs if room_of(pair[0]) != room_of(pair[1]) and pair[1] != PACKAGE.name]


def room_of(module):
    return module.split(".")[1] if "." in module else "__main__"


def floor_of(module):
    return next(index for index, rooms in enumerate(FLOORS) if room_of(module) in rooms)


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
