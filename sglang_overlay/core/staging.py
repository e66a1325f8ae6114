# SPDX-License-Identifier: Apache-2.0
"""Keep high-precision pieces of units that are not yet completely written, and account for their memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from sglang_overlay.core.regions import Box, difference, extent, intersection, shifted, slices


@dataclass(frozen=True)
class Piece:
    """The values of one box of a unit.

    Attributes:
        box: where in the unit.
        values: high precision, with the shape of the box.
    """

    box: Box
    values: torch.Tensor

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.values.numel()

    @property
    def is_fill(self) -> bool:
        """Whether all values share one element of memory, as ``zero_`` and ``fill_`` write them."""
        return bool(self.box) and not any(self.values.stride())

    def copied(self, dtype: torch.dtype, device: torch.device) -> Piece:
        """The same values in memory of their own; a fill stays one element."""
        if self.is_fill:
            element = self.values[(0,) * len(self.box)].to(dtype=dtype, device=device, copy=True)
            return Piece(self.box, element.expand(extent(self.box)))
        return Piece(self.box, torch.empty(extent(self.box), dtype=dtype, device=device).copy_(self.values))

    def without(self, hole: Box) -> list[Piece]:
        """What is left of the piece outside ``hole``, as views of the same memory."""
        return [Piece(box, self.values[slices(shifted(box, self.box))]) for box in difference(self.box, hole)]


class StagingAccount:
    """Counts bytes of staging memory and of fp8 storage. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held = 0
        self._peak = 0
        self._stored = 0

    @property
    def stored(self) -> int:
        """Bytes of fp8 weights and scales allocated."""
        return self._stored

    def store(self, size: int) -> None:
        """Count ``size`` bytes of fp8 storage."""
        with self._lock:
            self._stored += size

    @property
    def held(self) -> int:
        """Bytes held now."""
        return self._held

    @property
    def peak(self) -> int:
        """The most bytes held at any time."""
        return self._peak

    def add(self, size: int) -> None:
        """Count ``size`` more bytes of staging memory; negative when memory is released."""
        with self._lock:
            self._held += size
            self._peak = max(self._peak, self._held)


@dataclass
class StagedUnit:
    """Disjoint pieces of one unit. Used by one thread at a time: the stream marks the unit busy around each call.

    Attributes:
        pieces: writes that have not been overwritten since.
        has_background: whether a fill has been partly overwritten. Then the loader clears before it writes, so a
            covered unit may still be incomplete.
    """

    account: StagingAccount
    pieces: list[Piece] = field(default_factory=list)
    has_background: bool = False
    _held: dict[int, int] = field(default_factory=dict)

    def overwrite(self, box: Box) -> None:
        """Discard earlier writes to ``box``: the last write wins, as without streaming."""
        touched = [piece for piece in self.pieces if intersection(piece.box, box) is not None]
        if not touched:
            return
        self.has_background |= any(piece.is_fill for piece in touched)
        self.pieces = [part for piece in self.pieces for part in piece.without(box)]
        self._forget(self._held.keys() - {_storage_of(piece) for piece in self.pieces})

    def hold(self, piece: Piece) -> None:
        """Keep a piece. Its memory must belong to this unit alone."""
        self.pieces.append(piece)
        size = piece.values.untyped_storage().nbytes()
        self._held[_storage_of(piece)] = size
        self.account.add(size)

    @property
    def covered(self) -> int:
        """Elements held."""
        return sum(piece.size for piece in self.pieces)

    def release(self) -> None:
        """Release all memory."""
        self.pieces = []
        self._forget(list(self._held))

    def _forget(self, storages: Iterable[int]) -> None:
        """Stop counting these storages: their pieces are gone."""
        for storage in storages:
            self.account.add(-self._held.pop(storage))


def _storage_of(piece: Piece) -> int:
    storage: int = piece.values.untyped_storage()._cdata
    return storage
