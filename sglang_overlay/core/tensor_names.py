# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint tensors a layer lacks, told from the names that it and layers like it were loaded from.

Nothing says which tensors a checkpoint should hold. But layers are alike, and so are experts: what ``layers.3`` was
loaded from, ``layers.2`` needs as well, and an expert whose ``gate_proj`` came needs its ``up_proj``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import chain, zip_longest

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A number that is a whole part of a dotted name."""


def missing_names(layer: str, written: Mapping[str, Collection[str]]) -> list[str]:
    """Names of tensors that ``layer`` was not loaded from and should have been; empty where nothing tells.

    Args:
        layer: its qualified name in the model.
        written: names of the checkpoint tensors that went into each layer, by the layer's name; ``layer`` itself may be
            absent. Layers that lack something themselves do no harm, but tell less.
    """
    found = set(written.get(layer, ()))
    expected = {*_from_siblings(layer, written), *_from_experts(found)}
    return sorted(expected - found, key=_in_number_order)


def _from_siblings(layer: str, written: Mapping[str, Collection[str]]) -> Iterator[str]:
    mine = _numbers(layer)
    for sibling, names in written.items():
        differing = [(theirs, own) for theirs, own in zip(_numbers(sibling), mine, strict=False) if theirs != own]
        if pattern_of(sibling) == pattern_of(layer) and len(differing) == 1:
            yield from filter(None, (_renumbered(name, *differing[0]) for name in names))


def _renumbered(name: str, old: str, new: str) -> str | None:
    """The layer's number is the first that equals it: an expert's number comes after."""
    found = next((match for match in _NUMBER.finditer(name) if match.group() == old), None)
    return None if found is None else f"{name[: found.start()]}{new}{name[found.end() :]}"


def _from_experts(found: Collection[str]) -> Iterator[str]:
    """Every combination of a pattern of names and numbers that came with another pattern."""
    numbers: dict[int, set[tuple[str, ...]]] = {}
    patterns = {pattern_of(name) for name in found}
    for name in found:
        seen = _numbers(name)
        numbers.setdefault(len(seen), set()).add(seen)
    for pattern in patterns:
        for combination in numbers[len(pattern) - 1]:
            yield _joined(pattern, combination)


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(_NUMBER.findall(name))


def pattern_of(name: str) -> tuple[str, ...]:
    """What stands around the numbers of a dotted name: equal for what is alike in different layers or experts."""
    return tuple(_NUMBER.split(name))


def _joined(pattern: tuple[str, ...], numbers: tuple[str, ...]) -> str:
    return "".join(chain.from_iterable(zip_longest(pattern, numbers, fillvalue="")))


def _in_number_order(name: str) -> tuple[tuple[int, ...], str]:
    return tuple(int(number) for number in _numbers(name)), name
