"""Edits of SGLang's own files: `patches/edits/<patch>.diff`, written by hand once for all releases.

    # A comment.
    --- python/sglang/srt/layers/quantization/fp8.py
    @@ @@
     import torch
    +import another
    @@ Fp8MoEMethod.create_weights @@
         context
    -    old
    +    new
    @@ or Fp8MoEMethod.create_weights @@
    ...
    @@ optional Fp8Config.get_name @@
    ...

A hunk has no line numbers. Its context and removed lines must occur once, contiguous, in the function it names
(decorators included), in the class it names, or outside of all functions and classes if it names none. `or` is an
alternative to the hunk before it, and may stand under another `---`: the first that fits is made. `optional` is made
only where it fits. An empty line is context, except at the end of a hunk.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

Read = Callable[[str], str | None]
"""The text of a file by its path in SGLang's repository; None if there is none."""

_HEAD = re.compile(r"@@ (?:(or|optional) )?(?:([\w.]+) )?@@")
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Hunk:
    """Lines and what replaces them.

    Attributes:
        path: of the file.
        place: name of the function or class; empty: outside of all of them.
        before, after: the lines.
    """

    path: str
    place: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}, {self.place or 'outside of functions and classes'}"


@dataclass(frozen=True)
class Edit:
    """One change: the first of its hunks that fits, or none if it is optional."""

    hunks: tuple[Hunk, ...]
    is_optional: bool = False


class EditError(Exception):
    """A patch has edits that do not fit a release.

    Attributes:
        patch: its number.
        misfits: each of them, and why.
    """

    def __init__(self, patch: int, misfits: Sequence[tuple[Edit, str]]) -> None:
        super().__init__("\n".join(f"patch {patch} does not fit: {why}" for _, why in misfits))
        self.patch = patch
        self.misfits = tuple(misfits)


def parsed(text: str, name: str) -> list[Edit]:
    """The edits of a file in `patches/edits`.

    Args:
        text: of the file.
        name: of the file, for errors.

    Raises:
        ValueError: it is not in the format that the module's docstring describes.
    """
    edits: list[Edit] = []
    path = ""
    for block in re.split(r"^(?=@@ |--- )", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE):
        first, *lines = block.rstrip("\n").split("\n")
        head = _HEAD.fullmatch(first)
        if head is None:
            path = first.removeprefix("--- ")
            if any(lines) or (path and not first.startswith("--- ")):
                raise ValueError(f"{name}: not in a hunk: {block}")
            continue
        if not path or {line[:1] for line in lines} - {"", " ", "-", "+"}:
            raise ValueError(f"{name}: a hunk has no file, or lines that are not marked:\n{block}")
        hunk = Hunk(path, head[2] or "", _unmarked(lines, "-"), _unmarked(lines, "+"))
        if not any(hunk.before) or hunk.before == hunk.after:
            raise ValueError(f"{name}: a hunk changes nothing, or nothing says where:\n{block}")
        if head[1] == "or":
            edits[-1] = replace(edits[-1], hunks=(*edits[-1].hunks, hunk))
        else:
            edits.append(Edit((hunk,), is_optional=head[1] == "optional"))
    return edits


def _unmarked(lines: Sequence[str], mark: str) -> tuple[str, ...]:
    """Context, and the lines with this mark."""
    return tuple(line[1:] for line in lines if line[:1] in ("", " ", mark))


def edited(read: Read, edits: Sequence[Edit], patch: int) -> dict[str, str]:
    """The files that a patch's edits change, by path, in their form after it.

    Args:
        read: gives the files before the patch.
        edits: of the patch; no two may change the same line.
        patch: its number, for errors.

    Raises:
        EditError: an edit that is not optional fits nowhere.
    """
    fits = [(edit, fitting(read, edit)) for edit in edits]
    if misfits := [(edit, why_not(read, edit)) for edit, fit in fits if fit is None and not edit.is_optional]:
        raise EditError(patch, misfits)
    changes: dict[str, list[_Change]] = {}
    for _, fit in fits:
        if fit is not None:
            hunk, first = fit
            changes.setdefault(hunk.path, []).append(_trimmed(hunk, first))
    return {path: _with_changes(read(path) or "", found, path) for path, found in changes.items()}


_Change = tuple[int, int, tuple[str, ...]]
"""Numbers of the first line replaced and of the one after the last, from 0, and the new lines."""


def _trimmed(hunk: Hunk, first: int) -> _Change:
    """Without the context around it, which hunks may share."""
    before, after = hunk.before, hunk.after
    shorter = min(len(before), len(after))
    head = next((n for n in range(shorter) if before[n] != after[n]), shorter)
    tail = next((n for n in range(shorter - head) if before[-1 - n] != after[-1 - n]), shorter - head)
    return first + head, first + len(before) - tail, after[head : len(after) - tail]


def _with_changes(text: str, changes: list[_Change], path: str) -> str:
    lines = text.split("\n")
    changes.sort(key=lambda change: change[:2])
    if any(end > start for (_, end, _), (start, _, _) in itertools.pairwise(changes)):
        raise ValueError(f"two hunks change the same line of {path}")
    for start, end, new in reversed(changes):
        lines[start:end] = new
    return "\n".join(lines)


def fitting(read: Read, edit: Edit) -> tuple[Hunk, int] | None:
    """The hunk of an edit that is made, and the number of its first line, from 0; None if none fits."""
    found = ((hunk, _occurrences(read, hunk)) for hunk in edit.hunks)
    return next(((hunk, lines[0]) for hunk, lines in found if len(lines) == 1), None)


def why_not(read: Read, edit: Edit) -> str:
    """Why no hunk of an edit fits, for each place once."""
    return "; ".join(dict.fromkeys(f"{hunk}: {_problem(read, hunk)}" for hunk in edit.hunks))


def _problem(read: Read, hunk: Hunk) -> str:
    text = read(hunk.path)
    if text is None:
        return "there is no such file"
    if not lines_of(text, hunk.place):
        return "there is no such function"
    count = len(_occurrences(read, hunk))
    return f"the lines to change occur {count} times" if count else "the lines to change are not there"


def _occurrences(read: Read, hunk: Hunk) -> list[int]:
    """Where a hunk's lines begin."""
    text = read(hunk.path)
    if text is None:
        return []
    lines, size, place = text.split("\n"), len(hunk.before), lines_of(text, hunk.place)
    starts = (n for n in place if tuple(lines[n : n + size]) == hunk.before)
    return [n for n in starts if place.issuperset(range(n, n + size))]


@lru_cache(maxsize=64)
def lines_of(text: str, place: str) -> frozenset[int]:
    """Numbers of a place's lines, from 0: of a function or class, or those outside of all functions and classes."""
    tree = _tree(text)
    if place:
        return frozenset(number for found in _named(tree, place) for number in _numbers(found))
    defined = {number for found in _definitions(tree) for number in _numbers(found)}
    return frozenset(range(len(text.split("\n")))) - defined


@lru_cache(maxsize=8)
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


def _numbers(found: _Definition) -> range:
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    return range(first - 1, found.end_lineno or first)


def _named(node: ast.AST, name: str) -> Iterator[_Definition]:
    """Definitions by dotted name; there are several where branches of a module have one each."""
    first, _, rest = name.partition(".")
    for found in _definitions(node):
        if found.name == first:
            yield from _named(found, rest) if rest else (found,)


def _definitions(node: ast.AST) -> Iterator[_Definition]:
    """Functions and classes in a node, in its branches too, but not in one another."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Definition):
            yield child
        elif not isinstance(child, ast.expr):
            yield from _definitions(child)
