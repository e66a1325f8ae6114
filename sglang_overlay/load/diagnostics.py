# SPDX-License-Identifier: Apache-2.0
"""Diagnostics of a load's weights: missing ones, NaN and Inf, misfits, and tensors that came twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sglang_overlay.core.load_errors import IncompleteLoadError, MisfitError, NonFiniteWeightError
from sglang_overlay.core.loader_calls import PADDED, Misfit
from sglang_overlay.core.messages import MAX_LISTED, sentence, shortened
from sglang_overlay.core.quantizers import units_not_finite
from sglang_overlay.core.tensor_names import Misplaced, missing_names, pattern_of, prefix_changes
from sglang_overlay.load import eligibility
from sglang_overlay.load.checkpoint_files import file_problems, values_not_finite

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tolerance:
    """Which problems are warnings instead of errors.

    Attributes:
        missing: whether weights that the checkpoint lacks are only a warning.
        not_finite: the same for NaN and Inf, and for tensors that do not fill their part of a weight.
        missing_switch: the user's setting that turns ``missing`` on, such as ``VARIABLE=1``.
        not_finite_switch: the same for ``not_finite``.
    """

    missing: bool
    missing_switch: str
    not_finite: bool = True
    not_finite_switch: str = ""


@dataclass(frozen=True)
class Read:
    """The entries that were read from a checkpoint.

    Attributes:
        entries: by name; a description of each entry that is not a tensor with data, else None.
        held: names of the model's own parameters and buffers.
    """

    entries: Mapping[str, str | None]
    held: Collection[str]

    def unused(self, written: Collection[str], changes: Collection[tuple[str, str]]) -> list[str]:
        """Entries that, judging by their names, were not loaded; a bias counts as loaded if its weight was.

        Args:
            written: names of tensors that are known to have been loaded.
            changes: prefixes in the checkpoint with those that SGLang gives them.
        """
        places = {name.rpartition(".")[0] for name in written}
        return [
            name
            for name in self.entries
            if name not in written and not self._is_held(name, changes) and name.rpartition(".")[0] not in places
        ]

    def _is_held(self, name: str, changes: Collection[tuple[str, str]]) -> bool:
        changed = (ours + name.removeprefix(theirs) for theirs, ours in changes if name.startswith(theirs))
        return name in self.held or any(other in self.held for other in changed)

    def told(self, names: Iterable[str]) -> str:
        """A list of entries, for a message."""
        return shortened([f"{name} ({odd})" if (odd := self.entries[name]) else name for name in names])


@dataclass(frozen=True)
class WantedShapes:
    """What is known of the shapes that a model expects of checkpoint tensors.

    Attributes:
        sizes: numbers in its config.
        fitting: name patterns of tensors of which at least one fills its part of a weight.
    """

    sizes: Collection[int] = frozenset()
    fitting: Collection[tuple[str, ...]] = frozenset()

    def unmeant(self, misfits: Sequence[Misfit]) -> list[Misfit]:
        """Those of ``misfits`` that are not intended by the model; pass all of one load, or one call of an update.

        A padding is intended if the tensor's size is in the model's config and all tensors of its kind have that size.
        Qwen2.5-VL's vision tower pads for alignment, and SGLang where a size does not divide by the CPUs.
        """
        shapes: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
        for misfit in misfits:
            differing = set(misfit.shape) - set(misfit.wanted)
            is_said = misfit.outcome == PADDED and not differing.isdisjoint(self.sizes)
            shapes.setdefault(pattern_of(misfit.tensor), set()).add(misfit.shape if is_said else ())
        meant = {pattern for pattern, found in shapes.items() if len(found) == 1 and () not in found}
        meant.difference_update(self.fitting)
        return [misfit for misfit in misfits if pattern_of(misfit.tensor) not in meant]


Origins = Callable[[Sequence[int] | None], list[str]]


class Weight(Protocol):
    """A loaded weight, which consists of units."""

    @property
    def name(self) -> str:
        """The parameter's qualified name."""

    @property
    def units(self) -> int:
        """Number of units."""

    @property
    def rewritten(self) -> Collection[str]:
        """Checkpoint tensors that replaced other values, staged or quantized."""

    @property
    def magnitudes(self) -> torch.Tensor:
        """The largest magnitude of each unit, ``[units]``."""

    @property
    def origins(self) -> Origins:
        """Returns the names of the checkpoint tensors that were written into some units, or into any (None)."""


@dataclass(frozen=True)
class _Incomplete:
    """A parameter with units that were never completely written."""

    layer: str
    parameter: str
    units: Sequence[int]
    total: int


@dataclass(frozen=True)
class _Magnitudes:
    """Shows later whether a parameter is finite, without keeping its memory."""

    name: str
    magnitudes: torch.Tensor
    origins: Origins


@dataclass(frozen=True)
class _NotFinite:
    """A parameter with NaN or Inf: a description, and the checkpoint tensors that went into its damaged units."""

    told: str
    origins: Sequence[str]

    def tell_origins(self, counts: Mapping[str, tuple[int, int]]) -> str:
        """For a message: the tensors that are known to hold NaN or Inf, or all if none is known to."""
        damaged = [
            f"{name} ({count} of {total} values)"
            for name in self.origins
            for count, total in [counts.get(name, (0, 0))]
            if count
        ]
        return shortened(damaged or self.origins) or "tensors of unknown name"


class Diagnostics:
    """Collects facts about each parameter (``note``), and warns or raises when loading has ended (``conclude``)."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.misfits: list[Misfit] = []
        self._incomplete: list[_Incomplete] = []
        self._magnitudes: list[_Magnitudes] = []
        self._rewritten: list[str] = []
        self._written: dict[str, list[str]] = {}

    def note(self, layer: str, weight: Weight, missing: Sequence[int]) -> None:
        """Keep what matters of a weight of ``layer``; ``missing`` are units that were never completely written."""
        self._written.setdefault(layer, []).extend(weight.origins(None))
        if missing:
            self._incomplete.append(_Incomplete(layer, weight.name, missing, weight.units))
        self._magnitudes.append(_Magnitudes(weight.name, weight.magnitudes, weight.origins))
        self._rewritten += weight.rewritten

    def wanted(self, folder: Path, config: Mapping[str, Any]) -> WantedShapes:
        """What is known of the shapes that the model expects.

        Args:
            folder: of the checkpoint.
            config: its config.json as SGLang holds it, possibly adapted to the machine.
        """
        misfits = {misfit.tensor for misfit in self.misfits}
        written = (name for names in self._written.values() for name in names)
        return WantedShapes(
            frozenset({*_numbers_in(config), *_numbers_in(_config_in(folder))}),
            frozenset(pattern_of(name) for name in written if name not in misfits),
        )

    def conclude_misfits(self, tolerance: Tolerance, wanted: WantedShapes) -> None:
        """Report the checkpoint tensors that do not fill their part of a weight (``misfits``).

        Args:
            tolerance: what is an error and what a warning.
            wanted: what is known of the shapes that the model expects.

        Raises:
            MisfitError: there are some, and they are not tolerated.
        """
        found = [str(misfit) for misfit in wanted.unmeant(self.misfits)]
        if not found:
            return
        text = f"{len(found)} tensors of the checkpoint do not have the shape that the model needs: {shortened(found)}"
        if not tolerance.not_finite:
            raise MisfitError(
                f"{text}. Compare its config.json with what it holds; {tolerance.not_finite_switch} serves what is "
                "left, with a warning."
            )
        self.warn(f"{text}. They are loaded as in stock SGLang, which says nothing; expect garbage")

    def conclude_unused(self, shares_keys_and_values: Callable[[str], bool]) -> None:
        """Tell of missing weights that nothing uses; ``conclude`` does not count them.

        Args:
            shares_keys_and_values: whether the attention that a layer, by name, belongs to has none of its own.
        """
        unused = [found for found in self._incomplete if self._has_queries_alone(found.layer)]
        unused = [found for found in unused if shares_keys_and_values(found.layer)]
        if unused:
            self._incomplete = [found for found in self._incomplete if found not in unused]
            logger.info(
                "StreamFP8: %s have rows for keys and values that nothing uses, and that are not in the checkpoint.",
                shortened([found.parameter for found in unused]),
            )

    def _has_queries_alone(self, layer: str) -> bool:
        """Whether of queries, keys and values only the queries came for a layer."""
        came = self._written.get(layer, ())
        return bool(came) and all(".q_proj." in name for name in came)

    def conclude(self, tolerance: Tolerance, read: Read, files: Collection[Path]) -> None:
        """Report missing weights, NaN and Inf, and tensors that came twice.

        Args:
            tolerance: what is an error and what a warning.
            read: the checkpoint's entries.
            files: of the checkpoint.

        Raises:
            IncompleteLoadError: weights are missing, and that is not tolerated.
            NonFiniteWeightError: there are NaN or Inf, and they are not tolerated.
        """
        if self._incomplete:
            self._conclude_missing(tolerance, read, files)
        not_finite = self._not_finite()
        if not_finite:
            self._conclude_not_finite(not_finite, tolerance, files)
        if self._rewritten:
            self.warn(
                f"the checkpoint holds these tensors more than once, with different values: "
                f"{shortened(sorted(set(self._rewritten)))}. The last one read is served, as in stock SGLang"
            )

    def _conclude_missing(self, tolerance: Tolerance, read: Read, files: Collection[Path]) -> None:
        lines = [self._describe(found, read.entries) for found in self._incomplete[:MAX_LISTED]]
        more = len(self._incomplete) - MAX_LISTED
        lines += [f"and {more} more parameters"] if more > 0 else []
        misplaced = self._misplaced(read)
        lines += [f"read, but loaded into nothing: {read.told(misplaced.names)}"] if misplaced.names else []
        lines += file_problems(files)
        text = "\n  ".join(
            [f"{len(self._incomplete)} parameters were never completely written from the checkpoint:", *lines]
        )
        needed = [found.parameter for found in self._incomplete if eligibility.why_deferred(found.layer)]
        if tolerance.missing and not needed:
            self.warn(f"{text}\n  What is missing is zero, since {tolerance.missing_switch}")
            return
        zeros = f"{tolerance.missing_switch} serves zeros in these places"
        raise IncompleteLoadError(
            f"{text}\nStock SGLang would serve uninitialized memory here. {_next_step(misplaced, read)} "
            f"{f'SGLang cannot serve at all without {shortened(needed)}' if needed else zeros}."
        )

    def _misplaced(self, read: Read) -> Misplaced:
        """Tensors that were not loaded but belong to layers that lack something; all of them if nothing was loaded."""
        changes = prefix_changes(self._written)
        unused = read.unused({name for names in self._written.values() for name in names}, changes)
        lacking = {found.layer: found.layer.rpartition(".")[0] for found in self._incomplete}
        complete = [layer for layer in self._written if layer.rpartition(".")[0] not in lacking.values()]
        # Complete layers have unused tensors too, such as rotary frequencies; no layer needs those.
        needless = {pattern_of(name) for name in Misplaced.among(unused, complete).names}
        found = Misplaced.among((name for name in unused if pattern_of(name) not in needless), lacking, changes)
        if not found.names and not any(self._written.values()):
            return Misplaced(unused, "")
        return found

    def _describe(self, found: _Incomplete, seen: Collection[str]) -> str:
        names = missing_names(found.layer, self._written)
        absent = [name for name in names if name not in seen]
        unused = [name for name in names if name in seen]
        told = [f"missing {shortened(absent)}"] if absent else []
        told += [f"in the checkpoint but not loaded by the model {shortened(unused)}"] if unused else []
        came = self._written.get(found.layer)
        told = told or [f"only {shortened(came)} came for it" if came else "nothing came for it"]
        return f"{found.parameter} ({_counted(found.units, found.total)}): {'; '.join(told)}"

    def _not_finite(self) -> list[_NotFinite]:
        """Parameters with NaN or Inf. Waits for each device once."""
        found = units_not_finite([weight.magnitudes for weight in self._magnitudes])
        return [
            _NotFinite(f"{weight.name} ({_counted(units, weight.magnitudes.numel())})", weight.origins(units))
            for weight, units in zip(self._magnitudes, found, strict=True)
            if units
        ]

    def _conclude_not_finite(self, found: Sequence[_NotFinite], tolerance: Tolerance, files: Collection[Path]) -> None:
        listed = found[:MAX_LISTED]
        names = [name for one in listed for name in one.origins[:MAX_LISTED]]
        counts = values_not_finite(files, names)
        lines = [f"{one.told}, loaded from {one.tell_origins(counts)}" for one in found]
        text = f"NaN or Inf in {len(found)} parameters: {shortened(lines)}"
        if not tolerance.not_finite:
            raise NonFiniteWeightError(
                f"{text}. The model would answer with garbage; {tolerance.not_finite_switch} serves it nonetheless, "
                "with a warning."
            )
        self.warn(f"{text}. They are quantized as in stock SGLang, which says nothing; expect garbage")

    def warn(self, text: str) -> None:
        """Log a warning, and keep it."""
        self.warnings.append(text)
        logger.warning("StreamFP8: %s", sentence(text))


def kept_misfits(layer: str, misfits: Iterable[Misfit], placeholders: Mapping[str, torch.Tensor]) -> list[Misfit]:
    """``misfits`` without the paddings of ``layer`` that SGLang announces.

    SGLang makes experts larger for some kernels (aiter's), marks the parameter (``weight_padded``), and pads them
    itself.
    """
    padded = {f"{layer}.{key}" for key, value in placeholders.items() if getattr(value, "weight_padded", False)}
    return [misfit for misfit in misfits if misfit.outcome != PADDED or misfit.parameter not in padded]


def _next_step(misplaced: Misplaced, read: Read) -> str:
    if misplaced.advice:
        return misplaced.advice
    if any(read.entries[name] for name in misplaced.names):
        return "Save the tensors themselves, each under the name that the model looks for."
    complete = "Complete the checkpoint (download it anew, check its index)"
    return f"{complete}, or give its tensors the names that the model looks for." if misplaced.names else f"{complete}."


def _config_in(folder: Path) -> Any:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _numbers_in(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers_in(item)


def _counted(units: Sequence[int], total: int) -> str:
    return f"{len(units)} of {total} units" + (f": {shortened([str(unit) for unit in units])}" if total > 1 else "")
