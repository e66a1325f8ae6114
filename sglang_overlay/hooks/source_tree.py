# SPDX-License-Identifier: Apache-2.0
"""Inspect SGLang's functions in its source files, without importing it."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sglang_overlay.hooks.hook import Hook, HookState, State, module_of, why_not_called

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """A function of a release.

    Attributes:
        file: the file that defines it.
        node: its syntax tree.
    """

    file: Path
    node: Function

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of its parameters, without ``*args`` and ``**kwargs``."""
        given = self.node.args
        return tuple(argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs))

    @property
    def takes_any(self) -> bool:
        """Whether it has ``**kwargs``."""
        return self.node.args.kwarg is not None

    @property
    def text(self) -> str:
        """The function's source in a canonical layout, without comments."""
        return ast.unparse(self.node)

    @property
    def fingerprint(self) -> str:
        """Hash of code and parameters, independent of layout, comments, docstrings, annotations and Python version."""
        return hashlib.sha256(_canonical(self.node).encode()).hexdigest()[:16]


def find(root: Path, target: str) -> Source | None:
    """Look up a function or method by its dotted name; None if there is none.

    Args:
        root: folder that contains the ``sglang`` package.
        target: may also be a function that its module imports from elsewhere in SGLang, or a method that its class
            inherits from one in the same module.
    """
    module = module_of(target)
    *classes, name = target.removeprefix(f"{module}.").split(".")
    if not classes:
        return _function(root, module, name)
    function = _method(_body(root, module), classes[0], name)
    return None if function is None else Source(_file(root, module), function)


def inspect_hooks(root: Path, hooks: Iterable[Hook]) -> list[HookState]:
    """Like ``hook.inspect_hooks``, but from source files: a target that fits is ``ready``, never ``active``."""
    return [_inspect(root, hook) for hook in hooks]


def _inspect(root: Path, hook: Hook) -> HookState:
    for candidate in hook.candidates:
        source = find(root, candidate.target)
        if source is None:
            continue
        problem = why_not_called(candidate, source.parameters, _taken_by_wrapper(candidate))
        return HookState(candidate, State.SIGNATURE if problem else State.READY, problem)
    return HookState(hook, State.ABSENT, hook.without) if hook.without else HookState(hook, State.MISSING)


def _taken_by_wrapper(hook: Hook) -> int | None:
    wrapper = find(Path(__file__).parents[2], hook.wrapper.replace(":", "."))
    return None if wrapper is None or wrapper.takes_any else len(wrapper.parameters)


def _file(root: Path, module: str) -> Path:
    path = root.joinpath(*module.split("."))
    file = path.with_suffix(".py")
    return file if file.is_file() else path / "__init__.py"


@cache
def _body(root: Path, module: str) -> list[ast.stmt]:
    file = _file(root, module)
    return ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at the top level of a module or class, including those in its branches."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If | ast.Try):
            yield from _statements([*statement.body, *statement.orelse])


def _function(root: Path, module: str, name: str) -> Source | None:
    for statement in _statements(_body(root, module)):
        if isinstance(statement, Function) and statement.name == name:
            return Source(_file(root, module), statement)
        if isinstance(statement, ast.ImportFrom) and statement.module is not None:
            origin = next((alias.name for alias in statement.names if name in (alias.asname, alias.name)), None)
            if origin is not None and _body(root, statement.module):
                return _function(root, statement.module, origin)
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


_NOT_DONE = ("annotation", "returns", "type_comment", "kind")


def _canonical(part: object) -> str:
    """A syntax tree as text, without empty fields, since those differ between Python versions."""
    if isinstance(part, list):
        return f"[{','.join(map(_canonical, part))}]"
    if not isinstance(part, ast.AST):
        return repr(part)
    fields = {name: value for name, value in ast.iter_fields(part) if name not in _NOT_DONE}
    if isinstance(part, Function | ast.ClassDef) and ast.get_docstring(part, clean=False) is not None:
        fields["body"] = part.body[1:]
    written = (f"{name}={_canonical(value)}" for name, value in fields.items() if value not in (None, []))
    return f"{type(part).__name__}({','.join(written)})"
