# SPDX-License-Identifier: Apache-2.0
"""What a load has to tell about its weights: missing ones, NaN and Inf, tensors that came twice."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sglang_overlay.core.errors import MAX_LISTED, IncompleteLoadError, MisfitError, NonFiniteWeightError, shortened
from sglang_overlay.core.loader_calls import PADDED, Misfit
from sglang_overlay.core.tensor_names import missing_names, pattern_of
from sglang_overlay.upstream import eligibility
from sglang_overlay.upstream.checkpoint_files import file_problems, values_not_finite

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tolerance:
    """What is a warning, where it would otherwise be an error.

    Attributes:
        missing: weights that the checkpoint lacks.
        not_finite: NaN and Inf, and tensors that do not fill their part of a weight.
        missing_switch: the user's setting that makes ``missing`` so, such as ``VARIABLE=1``.
        not_finite_switch: likewise.
    """

    missing: bool
    missing_switch: str
    not_finite: bool = True
    not_finite_switch: str = ""


class Weight(Protocol):
    """A weight that has been loaded, by units."""

    @property
    def name(self) -> str:
        """Of the parameter."""

    @property
    def units(self) -> int:
        """How many it has."""

    @property
    def rewritten(self) -> Sequence[str]:
        """Checkpoint tensors that replaced other values."""

    def not_finite(self) -> list[int]:
        """Units with NaN or Inf."""

    def origins(self, units: Sequence[int] | None = None) -> list[str]:
        """Names of the checkpoint tensors that were written into ``units``, or anywhere."""


@dataclass(frozen=True)
class _Incomplete:
    """A parameter of which units were never completely written."""

    layer: str
    parameter: str
    units: Sequence[int]
    total: int


@dataclass(frozen=True)
class _NotFinite:
    """A parameter with NaN or Inf: what is told of it, and the checkpoint tensors that went into its damaged units."""

    told: str
    origins: Sequence[str]

    def tell_origins(self, counts: Mapping[str, tuple[int, int]]) -> str:
        """The tensors of which some values are known not to be finite, else all of them."""
        damaged = [
            f"{name} ({count} of {total} values)"
            for name in self.origins
            for count, total in [counts.get(name, (0, 0))]
            if count
        ]
        return shortened(damaged or self.origins) or "tensors of unknown name"


class Findings:
    """Collects what ``note`` is told of each parameter; ``conclude`` warns or raises, once, when loading has ended."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.misfits: list[Misfit] = []
        self._incomplete: list[_Incomplete] = []
        self._not_finite: list[_NotFinite] = []
        self._rewritten: list[str] = []
        self._written: dict[str, list[str]] = {}

    def note(self, layer: str, weight: Weight, missing: Sequence[int]) -> None:
        """Take over what a weight of ``layer`` knows; ``missing`` are units that were never completely written."""
        self._written.setdefault(layer, []).extend(weight.origins())
        if missing:
            self._incomplete.append(_Incomplete(layer, weight.name, missing, weight.units))
        damaged = weight.not_finite()
        if damaged:
            told = f"{weight.name} ({_counted(damaged, weight.units)})"
            self._not_finite.append(_NotFinite(told, weight.origins(damaged)))
        self._rewritten += weight.rewritten

    def conclude_misfits(self, tolerance: Tolerance, folder: Path, config: Mapping[str, Any]) -> None:
        """Say which checkpoint tensors do not fill their part of a weight, ``misfits``.

        Args:
            tolerance: what is an error and what a warning.
            folder: of the checkpoint.
            config: its config.json as SGLang has it, which may have been adapted to the machine since.

        Raises:
            MisfitError: there are some, and that is not allowed.
        """
        sizes = {*_numbers_in(config), *_numbers_in(_config_in(folder))} if self.misfits else set()
        meant = self._rounded_up(sizes)
        found = [str(misfit) for misfit in self.misfits if pattern_of(misfit.tensor) not in meant]
        if not found:
            return
        text = f"{len(found)} tensors of the checkpoint do not have the shape that the model needs: {shortened(found)}"
        if not tolerance.not_finite:
            raise MisfitError(
                f"{text}. Compare its config.json with what it holds; {tolerance.not_finite_switch} serves what is "
                "left, with a warning."
            )
        self.warn(f"{text}. They are loaded as in stock SGLang, which says nothing; expect garbage")

    def _rounded_up(self, sizes: Collection[int]) -> set[tuple[str, ...]]:
        """Patterns of tensors that are as long as the config says, and are padded all alike: the model wants them so.

        Qwen2.5-VL's vision tower does, for alignment, and SGLang where a size does not divide by the CPUs.
        """
        shapes: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
        for misfit in self.misfits:
            is_said = misfit.outcome == PADDED and not (set(misfit.shape) - set(misfit.wanted)).isdisjoint(sizes)
            shapes.setdefault(pattern_of(misfit.tensor), set()).add(misfit.shape if is_said else ())
        misfits = {misfit.tensor for misfit in self.misfits}
        others = {pattern_of(name) for names in self._written.values() for name in names if name not in misfits}
        return {pattern for pattern, found in shapes.items() if len(found) == 1 and () not in found} - others

    def conclude(self, tolerance: Tolerance, seen: Collection[str], folder: Path) -> None:
        """Say all of it.

        Args:
            tolerance: what is an error and what a warning.
            seen: names of all tensors that the checkpoint held.
            folder: of the checkpoint.

        Raises:
            IncompleteLoadError: weights are missing, and that is not allowed.
            NonFiniteWeightError: there are NaN or Inf, and that is not allowed.
        """
        if self._incomplete:
            self._conclude_missing(tolerance, seen, folder)
        if self._not_finite:
            self._conclude_not_finite(tolerance, folder)
        if self._rewritten:
            self.warn(
                f"the checkpoint holds these tensors more than once, with different values: "
                f"{shortened(sorted(set(self._rewritten)))}. The last one read is served, as in stock SGLang"
            )

    def _conclude_missing(self, tolerance: Tolerance, seen: Collection[str], folder: Path) -> None:
        lines = [self._describe(found, seen) for found in self._incomplete[:MAX_LISTED]]
        more = len(self._incomplete) - MAX_LISTED
        lines += [f"and {more} more parameters"] if more > 0 else []
        lines += file_problems(folder)
        text = "\n  ".join(
            [f"{len(self._incomplete)} parameters were never completely written from the checkpoint:", *lines]
        )
        needed = [found.parameter for found in self._incomplete if eligibility.why_deferred(found.layer)]
        if tolerance.missing and not needed:
            self.warn(f"{text}\n  What is missing is zero, since {tolerance.missing_switch}")
            return
        zeros = f"{tolerance.missing_switch} serves zeros in these places"
        raise IncompleteLoadError(
            f"{text}\nStock SGLang would serve uninitialized memory here. Complete the checkpoint (download it anew, "
            f"check its index). {f'SGLang cannot serve at all without {shortened(needed)}' if needed else zeros}."
        )

    def _describe(self, found: _Incomplete, seen: Collection[str]) -> str:
        names = missing_names(found.layer, self._written)
        absent = [name for name in names if name not in seen]
        unused = [name for name in names if name in seen]
        told = [f"missing {shortened(absent)}"] if absent else []
        told += [f"in the checkpoint but not loaded by the model {shortened(unused)}"] if unused else []
        return (
            f"{found.parameter} ({_counted(found.units, found.total)}): {'; '.join(told) or 'nothing tells its name'}"
        )

    def _conclude_not_finite(self, tolerance: Tolerance, folder: Path) -> None:
        listed = self._not_finite[:MAX_LISTED]
        names = [name for found in listed for name in found.origins[:MAX_LISTED]]
        counts = values_not_finite(folder, names)
        lines = [f"{found.told}, loaded from {found.tell_origins(counts)}" for found in self._not_finite]
        text = f"NaN or Inf in {len(self._not_finite)} parameters: {shortened(lines)}"
        if not tolerance.not_finite:
            raise NonFiniteWeightError(
                f"{text}. The model would answer with garbage; {tolerance.not_finite_switch} serves it nonetheless, "
                "with a warning."
            )
        self.warn(f"{text}. They are quantized as in stock SGLang, which says nothing; expect garbage")

    def warn(self, text: str) -> None:
        """Say it in the log, and keep it."""
        self.warnings.append(text)
        logger.warning("StreamFP8: %s.", text)


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
