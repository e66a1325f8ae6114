# SPDX-License-Identifier: Apache-2.0
"""Does a checkpoint tensor fill its part of a parameter? Weight loaders pad, repeat and cut what does not fit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from sglang_overlay.core.capture import WriteSink
from sglang_overlay.core.regions import Box, Placement, difference, extent

PADDED, REPEATED, CUT = "padded with zeros", "repeated", "cut off"
"""What a loader makes of a tensor that does not fit."""


@dataclass(frozen=True)
class Misfit:
    """A checkpoint tensor that is not what its parameter needs.

    Attributes:
        parameter: qualified name.
        tensor: the checkpoint's name; empty where it is unknown.
        shape: of the tensor as the loader got it.
        wanted: sizes of the part of the parameter that this rank loads from it.
        outcome: one of ``PADDED``, ``REPEATED``, ``CUT``.
    """

    parameter: str
    tensor: str
    shape: tuple[int, ...]
    wanted: tuple[int, ...]
    outcome: str

    def __str__(self) -> str:
        shape = list(self.shape)
        return f"{self.tensor or 'a tensor'} {shape}, {self.outcome} to {list(self.wanted)} of {self.parameter}"


class LoaderCall:
    """One call of a weight loader: the tensor it was given, and what it wrote.

    Args:
        given: the tensor.
        ranks: each of which may get a part of it, at most.
    """

    def __init__(self, given: torch.Tensor, ranks: int) -> None:
        self.given = given
        self._ranks = ranks
        self._memory = given.untyped_storage()._cdata
        self._sink: WatchedSink | None = None
        self._writes: list[tuple[torch.Tensor, bool]] = []
        self._taken = 0
        self._outcome = ""

    def note(self, sink: WatchedSink, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Note a write of ``source`` to the view ``destination`` of the placeholder of ``sink``."""
        self._sink = sink
        is_given = source.untyped_storage()._cdata == self._memory
        # Copies of a single scale have no strides either.
        is_fill = not is_given and destination.ndim > 0 and not any(source.stride())
        self._writes.append((destination, is_fill))
        self._taken += 0 if is_fill else source.numel()
        # One that is saved as a view that repeats its memory is as large as it says.
        if is_given and 0 in source.stride() and not _repeated(self.given):
            self._outcome = self._outcome or _repeated(source)
        elif not is_given and not is_fill and source.numel() * self._ranks > self.given.numel():
            self._outcome = self._outcome or _padded(source)

    def misfit(self, name: str) -> Misfit | None:
        """What is wrong with the tensor, called ``name`` in the checkpoint."""
        if self._sink is None:
            return None
        has_fills = any(is_fill for _, is_fill in self._writes)
        # Of a tensor that is too short there may be nothing left for this rank.
        outcome = self._outcome or (CUT if 0 < self._taken * self._ranks < self.given.numel() else "")
        if not outcome and not has_fills:
            return None
        boxes = [(Placement(view, self._sink.shape).box, is_fill) for view, is_fill in self._writes]
        wanted = extent(_around([box for box, _ in boxes]))[-self.given.ndim :]
        # A loader that fills first and then computes with what it was given is not seen to take it. Over several ranks
        # a tensor of that size leaves nothing for the others.
        is_whole = self._ranks == 1 and wanted == tuple(self.given.shape)
        outcome = PADDED if has_fills and not is_whole and _left(boxes) else outcome
        return Misfit(self._sink.name, name, tuple(self.given.shape), wanted, outcome) if outcome else None


def _repeated(source: torch.Tensor) -> str:
    repeats = any(not step and size > 1 for size, step in zip(source.shape, source.stride(), strict=True))
    return REPEATED if repeats else ""


def _padded(source: torch.Tensor) -> str:
    """A loader pads by putting zeros behind the rows or columns that it was given, in memory of its own."""
    if source.device.type != "cpu" or source.ndim < 2:
        return ""
    return "" if source[-1].any() and source[..., -1].any() else PADDED


def _left(boxes: Sequence[tuple[Box, bool]]) -> list[Box]:
    """What of fills no later write has covered."""
    left: list[Box] = []
    for box, is_fill in boxes:
        left = [part for fill in left for part in difference(fill, box)] + ([box] if is_fill else [])
    return left


def _around(boxes: Sequence[Box]) -> Box:
    """The smallest box that all lie in."""
    axes = zip(*boxes, strict=True)
    return tuple((min(start for start, _ in axis), max(stop for _, stop in axis)) for axis in axes)


class WatchedSink:
    """Passes writes on to a placeholder's sink, noted in the loader call that is under way in the thread."""

    def __init__(self, sink: WriteSink, shape: torch.Size, under_way: Callable[[], LoaderCall | None]) -> None:
        self.name = sink.name
        self.shape = shape
        self._sink = sink
        self._under_way = under_way

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        call = self._under_way()
        if call is not None and destination.numel():
            call.note(self, destination, source)
        self._sink.write(destination, source)


class LoaderCalls:
    """The calls that are under way, one a thread, and what was wrong with those that have ended.

    Args:
        ranks: that share a parameter at most.
        name_of: the checkpoint's name of a tensor.
    """

    def __init__(self, ranks: int, name_of: Callable[[torch.Tensor], str]) -> None:
        self.misfits: list[Misfit] = []
        self._ranks = ranks
        self._name_of = name_of
        self._thread = threading.local()

    def under_way(self) -> LoaderCall | None:
        """This thread's call."""
        return getattr(self._thread, "call", None)

    @contextmanager
    def of(self, arguments: Sequence[Any]) -> Iterator[None]:
        """Around a loader that may call others, or fail."""
        if self.under_way() is not None:
            yield
            return
        tensors = [value for value in arguments if isinstance(value, torch.Tensor) and not value.is_meta]
        call = self._thread.call = LoaderCall(tensors[0], self._ranks) if len(tensors) == 1 else None
        try:
            yield
        finally:
            self._thread.call = None
        misfit = None if call is None else call.misfit(self._name_of(call.given))
        if misfit is not None:
            self.misfits.append(misfit)
