# SPDX-License-Identifier: Apache-2.0
"""Detect checkpoint tensors that do not fill their part of a parameter: loaders silently pad, repeat or cut them."""

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
"""What a loader does to a tensor that does not fit."""


@dataclass(frozen=True)
class Misfit:
    """A checkpoint tensor that does not fit its parameter.

    Attributes:
        parameter: its qualified name.
        tensor: its name in the checkpoint; empty if unknown.
        shape: of the tensor as the loader got it.
        wanted: shape of the part of the parameter that this rank loads from it.
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
        ranks: the most ranks that share it.
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
        # Copies of a single scale have no nonzero strides either.
        is_fill = not is_given and destination.ndim > 0 and not any(source.stride())
        self._writes.append((destination, is_fill))
        self._taken += 0 if is_fill else source.numel()
        # A tensor that was saved as an expanded view is not repeated by the loader.
        if is_given and 0 in source.stride() and not _repeated(self.given):
            self._outcome = self._outcome or _repeated(source)
        elif not is_given and not is_fill and source.numel() * self._ranks > self.given.numel():
            self._outcome = self._outcome or _padded(source)

    def misfit(self, name_of: Callable[[torch.Tensor], str]) -> Misfit | None:
        """How the tensor does not fit, with its name in the checkpoint from ``name_of``; None if it does."""
        if self._sink is None:
            return None
        has_fills = any(is_fill for _, is_fill in self._writes)
        # A tensor that is too short may leave nothing for this rank.
        outcome = self._outcome or (CUT if 0 < self._taken * self._ranks < self.given.numel() else "")
        if not outcome and not has_fills:
            return None
        boxes = [(Placement(view, self._sink.shape).box, is_fill) for view, is_fill in self._writes]
        wanted = extent(_around([box for box, _ in boxes]))[-self.given.ndim :]
        # If a loader fills first and then writes values computed from the tensor, its taking the tensor goes unseen.
        # With several ranks, a tensor of that size leaves nothing for the others.
        is_whole = self._ranks == 1 and wanted == tuple(self.given.shape)
        outcome = PADDED if has_fills and not is_whole and _left(boxes) else outcome
        if not outcome:
            return None
        return Misfit(self._sink.name, name_of(self.given), tuple(self.given.shape), wanted, outcome)


def _repeated(source: torch.Tensor) -> str:
    repeats = any(not step and size > 1 for size, step in zip(source.shape, source.stride(), strict=True))
    return REPEATED if repeats else ""


def _padded(source: torch.Tensor) -> str:
    """``PADDED`` if the last row or column is zero: loaders pad with zeros at the end, in memory of their own."""
    if source.device.type != "cpu" or source.ndim < 2:
        return ""
    return "" if source[-1].any() and source[..., -1].any() else PADDED


def _left(boxes: Sequence[tuple[Box, bool]]) -> list[Box]:
    """The parts of fills that no later write has covered."""
    left: list[Box] = []
    for box, is_fill in boxes:
        left = [part for fill in left for part in difference(fill, box)] + ([box] if is_fill else [])
    return left


def _around(boxes: Sequence[Box]) -> Box:
    """The smallest box that contains all ``boxes``."""
    axes = zip(*boxes, strict=True)
    return tuple((min(start for start, _ in axis), max(stop for _, stop in axis)) for axis in axes)


class WatchedSink:
    """Passes writes on to a placeholder's sink, and notes them in the thread's current loader call."""

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
    """The current loader call of each thread, and the misfits of those that have ended.

    Args:
        ranks: the most ranks that share a parameter.
        name_of: returns a tensor's name in the checkpoint.
    """

    def __init__(self, ranks: int, name_of: Callable[[torch.Tensor], str]) -> None:
        self.misfits: list[Misfit] = []
        self._ranks = ranks
        self._name_of = name_of
        self._thread = threading.local()

    def under_way(self) -> LoaderCall | None:
        """This thread's current call."""
        return getattr(self._thread, "call", None)

    @contextmanager
    def of(self, arguments: Sequence[Any]) -> Iterator[None]:
        """Context for a loader that may call other loaders, or fail."""
        if self.under_way() is not None:
            yield
            return
        tensors = [value for value in arguments if isinstance(value, torch.Tensor) and not value.is_meta]
        call = self._thread.call = LoaderCall(tensors[0], self._ranks) if len(tensors) == 1 else None
        try:
            yield
        finally:
            self._thread.call = None
        misfit = None if call is None else call.misfit(self._name_of)
        if misfit is not None:
            self.misfits.append(misfit)
