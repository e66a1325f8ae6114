# SPDX-License-Identifier: Apache-2.0
"""SGLang's functions as they stand in its source files: what a release looks like, without importing it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sglang_overlay.upstream.touch_point import PointState, State, TouchPoint, module_of, why_not_called

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A function of a release.

    Attributes:
        parameters: their names, without those that take any others.
        takes_any: whether it takes any other by name.
        text: the function, laid out in one way; comments are not part of it.
    """

    parameters: tuple[str, ...]
    takes_any: bool
    text: str


def find(root: Path, target: str) -> Source | None:
    """Look a function or method up by its dotted name.

    Args:
        root: folder that the ``sglang`` package lies in.
        target: also found where its module has it from another one of SGLang's, and methods where a base class in the
            same module has them.
    """
    module = module_of(target)
    body = _body(root, module)
    if body is None:
        return None
    *classes, name = target.removeprefix(f"{module}.").split(".")
    function = _method(body, classes[0], name) if classes else _function(root, body, name)
    if function is None:
        return None
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return Source(tuple(names), given.kwarg is not None, ast.unparse(function))


def inspect_points(root: Path, points: Iterable[TouchPoint]) -> list[PointState]:
    """What ``touch_point.inspect_points`` finds in a running SGLang, told from its source files.

    A target that is as expected is ``ready``.
    """
    return [_inspect(root, point) for point in points]


def _inspect(root: Path, point: TouchPoint) -> PointState:
    for candidate in point.candidates:
        source = find(root, candidate.target)
        if source is None:
            continue
        problem = why_not_called(candidate, source.parameters, _taken_by_hook(candidate))
        return PointState(candidate, State.SIGNATURE if problem else State.READY, problem)
    return PointState(point, State.ABSENT, point.without) if point.without else PointState(point, State.MISSING)


def _taken_by_hook(point: TouchPoint) -> int | None:
    hook = find(Path(__file__).parents[2], point.hook.replace(":", "."))
    return None if hook is None or hook.takes_any else len(hook.parameters)


@cache
def _body(root: Path, module: str) -> list[ast.stmt] | None:
    path = root.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text(encoding="utf-8")).body
    return None


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What stands at the top of a module or class, branches included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements([*statement.body, *statement.orelse])


def _function(root: Path, body: list[ast.stmt], name: str) -> Function | None:
    for statement in _statements(body):
        if isinstance(statement, Function) and statement.name == name:
            return statement
        if isinstance(statement, ast.ImportFrom) and statement.module is not None:
            origin = next((alias.name for alias in statement.names if name in (alias.asname, alias.name)), None)
            elsewhere = _body(root, statement.module) if origin is not None else None
            if origin is not None and elsewhere is not None:
                return _function(root, elsewhere, origin)
    return None


def _method(body: list[ast.stmt], owner: str, name: str) -> Function | None:
    found = next((each for each in _statements(body) if isinstance(each, ast.ClassDef) and each.name == owner), None)
    if found is None:
        return None
    for statement in _statements(found.body):
        if isinstance(statement, Function) and statement.name == name:
            return statement
    bases = (_method(body, base.id, name) for base in found.bases if isinstance(base, ast.Name))
    return next((method for method in bases if method is not None), None)
