# SPDX-License-Identifier: Apache-2.0
"""Infer which checkpoint tensors a layer lacks from the names that it and similar layers were loaded from.

Nothing says which tensors a checkpoint should hold. But layers are alike, and so are experts: ``layers.2`` needs the
same tensors as ``layers.3``, and an expert whose ``gate_proj`` was loaded needs its ``up_proj``. A name that the model
does not know may contain a layer's name: ``_orig_mod.model.layers.2.mlp.up_proj.weight``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
"""A number that is an entire part of a dotted name."""


def missing_names(layer: str, written: Mapping[str, Collection[str]]) -> list[str]:
    """Names of tensors that ``layer`` should have been loaded from but was not; empty if unknown.

    Args:
        layer: its qualified name in the model.
        written: names of the checkpoint tensors that went into each layer, by the layer's name; ``layer`` itself may be
            absent. Incomplete layers do no harm, but help less.
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
    """Replace the first number that equals ``old``: that is the layer's, since an expert's number comes after it."""
    found = next((match for match in _NUMBER.finditer(name) if match.group() == old), None)
    return None if found is None else f"{name[: found.start()]}{new}{name[found.end() :]}"


def _from_experts(found: Collection[str]) -> Iterator[str]:
    """Every pattern with every combination of numbers that any pattern came with."""
    numbers: dict[int, set[tuple[str, ...]]] = {}
    patterns = {pattern_of(name) for name in found}
    for name in found:
        seen = _numbers(name)
        numbers.setdefault(len(seen), set()).add(seen)
    for pattern in patterns:
        for combination in numbers[len(pattern) - 1]:
            yield _joined(pattern, combination)


def prefix_changes(written: Mapping[str, Collection[str]]) -> set[tuple[str, str]]:
    """Prefixes in a checkpoint, each with the one in the model that it became: SGLang knows these, and changes them.

    Args:
        written: names of the checkpoint tensors that went into each layer, by the layer's name.
    """
    places = _Places(written)
    found = {places.prefixes_of(name) for names in written.values() for name in names}
    return {change for change in found if change is not None}


def _numbers(name: str) -> tuple[str, ...]:
    return tuple(_NUMBER.findall(name))


def pattern_of(name: str) -> tuple[str, ...]:
    """The parts of a dotted name around its numbers: equal for the same tensor of different layers or experts."""
    return tuple(_NUMBER.split(name))


def _joined(pattern: tuple[str, ...], numbers: tuple[str, ...]) -> str:
    return "".join(chain.from_iterable(zip_longest(pattern, numbers, fillvalue="")))


def _in_number_order(name: str) -> tuple[tuple[int, ...], str]:
    return tuple(int(number) for number in _numbers(name)), name


PACKED = frozenset(
    {"qweight", "qzeros", "scales", "g_idx", "SCB", "absmax"}
    | {f"weight_{part}" for part in ("packed", "shape", "scale", "scale_2", "scale_inv")}
)
"""Last name parts of tensors in checkpoints quantized with GPTQ, AWQ, compressed-tensors, fp8 or bitsandbytes."""


@dataclass(frozen=True)
class Misplaced:
    """Checkpoint tensors that were not loaded into any layer, but may be meant for layers that lack something.

    Attributes:
        names: the tensors' names, in the checkpoint's order.
        change: for a message, how to rename them so that they match layers; empty if they match already or if that is
            unknown.
    """

    names: Sequence[str]
    change: str

    @classmethod
    def among(
        cls, unused: Iterable[str], layers: Collection[str], known: Collection[tuple[str, str]] = ()
    ) -> Misplaced:
        """Find them.

        Args:
            unused: names of tensors that were not loaded into any layer.
            layers: qualified names of the layers that lack something.
            known: changes of prefixes (:func:`prefix_changes`) that are no help, since SGLang makes them itself.
        """
        places = _Places(layers)
        plain = {name: _unwrapped(name) for name in unused}
        prefixes = {name: found for name, inner in plain.items() if (found := places.prefixes_of(inner)) is not None}
        if not prefixes:
            return cls([], "")
        ((theirs, ours), _), *_ = Counter(prefixes.values()).most_common()
        names = [name for name, found in prefixes.items() if found == (theirs, ours)]
        wrappers = dict.fromkeys(part for name in names for part in name.split(".") if part.startswith("_"))
        change = "" if (theirs, ours) in known else _change_of(theirs, ours)
        return cls(names, " and ".join(filter(None, (_leave_out(wrappers), change))))

    @property
    def advice(self) -> str:
        """A sentence that says what to do about them; empty if unknown."""
        if any(name.rpartition(".")[2] in PACKED for name in self.names):
            return (
                "The checkpoint is quantized already: use the unquantized one, or the --quantization that belongs to "
                "it, with its quantization_config."
            )
        return f"Rename the checkpoint's tensors: {self.change}." if self.change else ""


class _Places:
    """Name prefixes under which some layers' tensors are found: beside a layer or in it, so under its parent's name."""

    def __init__(self, layers: Iterable[str]) -> None:
        self._ends: dict[tuple[str, ...], tuple[str, ...]] = {}
        for parent in dict.fromkeys(tuple(layer.split(".")[:-1]) for layer in layers):
            for start in range(len(parent)):
                end = parent[start:]
                # An end without a number would match any layer.
                if not start or any(part.isdigit() for part in end):
                    self._ends.setdefault(end, parent[:start])

    def prefixes_of(self, name: str) -> tuple[str, str] | None:
        """The prefixes, in ``name`` and in the model, before the longest end of a place that ``name`` contains."""
        parts = tuple(name.split("."))
        lengths = range(len(parts) - 1, 0, -1)
        windows = ((start, start + length) for length in lengths for start in range(len(parts) - length))
        found = next(((start, parts[start:stop]) for start, stop in windows if parts[start:stop] in self._ends), None)
        return None if found is None else (_dotted(parts[: found[0]]), _dotted(self._ends[found[1]]))


def _unwrapped(name: str) -> str:
    """Without the parts that ``torch.compile``, FSDP and others insert: ``_orig_mod``, ``_fsdp_wrapped_module``."""
    return ".".join(part for part in name.split(".") if not part.startswith("_"))


def _dotted(parts: Iterable[str]) -> str:
    return "".join(f"{part}." for part in parts)


def _leave_out(wrappers: Collection[str]) -> str:
    return f"leave out {', '.join(map(repr, map(_dotted, ([part] for part in wrappers))))}" if wrappers else ""


def _change_of(theirs: str, ours: str) -> str:
    if theirs == ours:
        return ""
    if not theirs:
        return f"put {ours!r} before them"
    return f"begin them with {ours!r} in place of {theirs!r}" if ours else f"strip {theirs!r} from their beginning"
