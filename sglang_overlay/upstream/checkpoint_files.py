# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint's files, told from their names and headers, and from single tensors where asked for.

SGLang loads what files there are, whatever the index says, and errors of the safetensors library name no file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

from safetensors import safe_open

_INDEX = "*.index.json"
_LENGTH = 8
"""Bytes in front of a safetensors header that say how long it is."""


def file_problems(folder: Path) -> list[str]:
    """Missing, empty, truncated and unreadable files of a local checkpoint; none for a path that is no folder."""
    return [*_missing(folder), *_damaged(folder)]


def values_not_finite(folder: Path, names: Collection[str]) -> dict[str, tuple[int, int]]:
    """How many values of these tensors are NaN or Inf, and of how many; only of those in safetensors files."""
    found: dict[str, tuple[int, int]] = {}
    for file in sorted(folder.glob("*.safetensors")) if names else ():
        with safe_open(file, framework="pt") as tensors:
            for name in set(names).intersection(tensors.keys()):
                values = tensors.get_tensor(name)
                found[name] = (int((~values.isfinite()).sum()), values.numel())
    return found


def _missing(folder: Path) -> Iterator[str]:
    indexes = sorted(folder.glob(_INDEX))
    # As of files: one of .bin files beside it is left over.
    for index in [index for index in indexes if ".safetensors." in index.name] or indexes:
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            yield f"{index.name} is no index of weights ({type(error).__name__}: {error})"
            continue
        for name in sorted(str(name) for name in named):
            if not (folder / name).exists():
                yield f"{index.name} names {name}, which is not there"


def _damaged(folder: Path) -> Iterator[str]:
    # SGLang reads .bin files only where there are no others; what else has that name is none of a checkpoint.
    for file in sorted([*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]):
        try:
            problem = _header_problem(file) if file.suffix == ".safetensors" else _size_problem(file)
        except OSError as error:
            problem = f"cannot be read ({error})"
        if problem is not None:
            yield f"{file.name} {problem}"


def _size_problem(file: Path) -> str | None:
    return None if file.stat().st_size else "is empty"


def _header_problem(file: Path) -> str | None:
    size = file.stat().st_size
    if size < _LENGTH:
        return f"is empty or cut off: it has {size} bytes"
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(_LENGTH))
    if length > size - _LENGTH:
        return f"is cut off or no safetensors file: its header should have {length} bytes, the file has {size}"
    try:
        with safe_open(file, framework="pt"):
            return None
    except Exception as error:
        return f"is damaged, or its download is incomplete: {error}"
