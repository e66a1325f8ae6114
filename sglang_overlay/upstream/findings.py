# SPDX-License-Identifier: Apache-2.0
"""What a load has to tell about its weights: missing ones, NaN and Inf, tensors that came twice."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_overlay.core.stream import ParameterStream
from sglang_overlay.core.tensor_names import missing_names
from sglang_overlay.errors import IncompleteLoadError, NonFiniteWeightError
from sglang_overlay.settings import ALLOW_MISSING_VARIABLE, MODE_VARIABLE, Mode, Settings
from sglang_overlay.upstream.checkpoint_files import file_problems

logger = logging.getLogger(__name__)

MAX_LISTED = 8
"""How many names a message lists before it says how many more there are."""


@dataclass(frozen=True)
class _Incomplete:
    """A parameter of which units were never completely written."""

    layer: str
    parameter: str
    units: Sequence[int]
    total: int


class Findings:
    """Collects what ``note`` is told of each parameter; ``conclude`` warns or raises, once, when loading has ended."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self._incomplete: list[_Incomplete] = []
        self._not_finite: list[str] = []
        self._rewritten: list[str] = []
        self._written: dict[str, list[str]] = {}

    def note(self, layer: str, stream: ParameterStream, missing: Sequence[int]) -> None:
        """Take over what a settled stream of ``layer`` knows; ``missing`` is what settling it gave."""
        self._written.setdefault(layer, []).extend(stream.origins())
        if missing:
            self._incomplete.append(_Incomplete(layer, stream.name, missing, stream.units))
        damaged = stream.not_finite()
        if damaged:
            origins = shortened(stream.origins(damaged)) or "tensors of unknown name"
            self._not_finite.append(f"{stream.name} ({_counted(damaged, stream.units)}), loaded from {origins}")
        self._rewritten += stream.rewritten

    def conclude(self, settings: Settings, seen: Collection[str], folder: Path) -> None:
        """Say all of it.

        Args:
            settings: what is an error and what a warning.
            seen: names of all tensors that the checkpoint held.
            folder: of the checkpoint.

        Raises:
            IncompleteLoadError: weights are missing, and that is not allowed.
            NonFiniteWeightError: there are NaN or Inf, and streaming is ``require``.
        """
        if self._incomplete:
            self._conclude_missing(settings, seen, folder)
        if self._not_finite:
            self._conclude_not_finite(settings)
        if self._rewritten:
            self._warn(
                f"the checkpoint holds these tensors more than once, with different values: "
                f"{shortened(sorted(set(self._rewritten)))}. The last one read is served, as in stock SGLang"
            )

    def _conclude_missing(self, settings: Settings, seen: Collection[str], folder: Path) -> None:
        lines = [self._describe(found, seen) for found in self._incomplete[:MAX_LISTED]]
        more = len(self._incomplete) - MAX_LISTED
        lines += [f"and {more} more parameters"] if more > 0 else []
        lines += file_problems(folder)
        text = "\n  ".join(
            [f"{len(self._incomplete)} parameters were never completely written from the checkpoint:", *lines]
        )
        if settings.allow_missing:
            self._warn(f"{text}\n  What is missing is zero, since {ALLOW_MISSING_VARIABLE}=1")
            return
        raise IncompleteLoadError(
            f"{text}\nStock SGLang would serve uninitialized memory here. Complete the checkpoint (download it anew, "
            f"check its index), or set {ALLOW_MISSING_VARIABLE}=1 to serve zeros in these places."
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

    def _conclude_not_finite(self, settings: Settings) -> None:
        text = f"NaN or Inf in {len(self._not_finite)} parameters: {shortened(self._not_finite)}"
        if settings.mode is Mode.REQUIRE:
            raise NonFiniteWeightError(
                f"{text}. The model would answer with garbage; {MODE_VARIABLE}=1 serves it nonetheless, with a warning."
            )
        self._warn(f"{text}. They are quantized as in stock SGLang, which says nothing; expect garbage")

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        logger.warning("StreamFP8: %s.", text)


def shortened(names: Sequence[str]) -> str:
    """A list for a message."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def _counted(units: Sequence[int], total: int) -> str:
    return f"{len(units)} of {total} units" + (f": {shortened([str(unit) for unit in units])}" if total > 1 else "")
