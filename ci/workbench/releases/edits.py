"""Lines that the patch series adds to SGLang's own files: decorators, an import, environment variables.

Existing lines are not changed, so an edit fits every release that has the function.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

DECORATOR = "streaming_hook"
ANCHOR = "SGLANG_SORT_WEIGHT_FILES"
"""New environment variables are declared after this one, which is also about reading weights."""


class EditError(Exception):
    """A release lacks a place for an edit."""


@dataclass(frozen=True)
class HookEdit:
    """A decorator for a function.

    Attributes:
        name: of a function or `Class.method`.
        wrapper: the decorator's argument.
    """

    name: str
    wrapper: str


@dataclass(frozen=True)
class EnvironmentField:
    """An environment variable.

    Attributes:
        name: of the variable.
        value: its declaration, such as `EnvBool(True)`.
        comment: lines that say what it is for.
    """

    name: str
    value: str
    comment: tuple[str, ...]


def edited(text: str, edits: Sequence[HookEdit | EnvironmentField], module: str, path: str) -> str:
    """A file with all edits made.

    Args:
        text: of the file.
        edits: what to add.
        module: where hooks' decorator is imported from.
        path: of the file, for messages.

    Raises:
        EditError: the file lacks a place for an edit.
    """
    body = ast.parse(text).body
    added: dict[int, list[str]] = {}
    hooks = [edit for edit in edits if isinstance(edit, HookEdit)]
    if hooks:
        added[_import_line(body, module, path)] = [f"from {module} import {DECORATOR}"]
    for hook in hooks:
        function = _function(body, hook.name, path)
        first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
        added.setdefault(first - 1, []).append(f'{" " * function.col_offset}@{DECORATOR}("{hook.wrapper}")')
    for field in edits:
        if isinstance(field, EnvironmentField):
            lines, indent = added.setdefault(_anchor_line(body, path), []), " " * 4
            lines += [f"{indent}# {line}" for line in field.comment]
            lines.append(f"{indent}{field.name} = {field.value}")
    return "".join(_with_lines(text, added))


def _with_lines(text: str, added: dict[int, list[str]]) -> Iterator[str]:
    """The text's lines, with the lines of `added` inserted after the line numbers that are its keys."""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if number == 1:
            yield from (f"{new}\n" for new in added.get(0, ()))
        yield line
        yield from (f"{new}\n" for new in added.get(number, ()))


def _function(body: list[ast.stmt], name: str, path: str) -> ast.FunctionDef | ast.AsyncFunctionDef:
    *owners, last = name.split(".")
    for owner in owners:
        classes = (each for each in body if isinstance(each, ast.ClassDef) and each.name == owner)
        body = next((found.body for found in classes), [])
    functions = (each for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
    found = next((function for function in functions if function.name == last), None)
    if found is None:
        raise EditError(f"{path} has no function {name} to be hooked")
    return found


def _import_line(body: list[ast.stmt], module: str, path: str) -> int:
    """The line after which an import belongs in isort's order: that of the alphabetically preceding module."""
    before = [
        (each.module, each.end_lineno)
        for each in body
        if isinstance(each, ast.ImportFrom) and each.module is not None and each.module.startswith("sglang.")
        if each.module < module
    ]
    if not before:
        raise EditError(f"{path} imports nothing that {module} could stand after")
    return max(before)[1] or 0


def _anchor_line(body: list[ast.stmt], path: str) -> int:
    for owner in body:
        for each in owner.body if isinstance(owner, ast.ClassDef) else ():
            targets = each.targets if isinstance(each, ast.Assign) else []
            if any(isinstance(target, ast.Name) and target.id == ANCHOR for target in targets):
                return each.end_lineno or 0
    raise EditError(f"{path} does not declare {ANCHOR}")
