# SPDX-License-Identifier: Apache-2.0
"""Keep in host memory what a weight update overwrites, so that a failed update can be undone."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import torch

from sglang_overlay.core.capture import storage_key
from sglang_overlay.core.quantizers import UnitQuantizer
from sglang_overlay.core.staging import Piece

Region = tuple[Any, ...]
"""Storage, offset, shape, strides and dtype of a view."""


class UndoLog:
    """Values that writes have replaced, newest call last.

    Each region is kept once per call, before its first write. Restoring starts with the newest, so overlapping regions
    end with their first values. Any thread may ``keep``; everything else may be called only while no loader runs.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._room = _Room()
        self._calls: list[dict[Region, tuple[torch.Tensor, torch.Tensor]]] = [{}]

    def keep(self, *views: torch.Tensor) -> None:
        """Keep the values of ``views``, which are about to be overwritten."""
        kept = self._calls[-1]
        for view in views:
            region = (storage_key(view), view.storage_offset(), view.shape, view.stride(), view.dtype)
            if region not in kept:
                with torch.no_grad():
                    pair = view.detach(), self._room.for_values_of(view).copy_(view)
                with self._lock:
                    kept.setdefault(region, pair)

    def begin_call(self) -> None:
        """From now on, ``undo_call`` goes back to here."""
        self._calls.append({})

    def keep_call(self) -> None:
        """End the last call, which succeeded: only ``undo`` can restore what it replaced."""
        last = self._calls.pop()
        for region, pair in last.items():
            self._calls[-1].setdefault(region, pair)

    def undo_call(self) -> None:
        """Restore what the last call replaced."""
        _put_back(self._calls.pop())

    def undo(self) -> None:
        """Restore everything."""
        for call in reversed(self._calls):
            _put_back(call)
        self.forget()

    def forget(self) -> None:
        """Keep the new values: drop the log."""
        self._room = _Room()
        self._calls = [{}]

    @property
    def bytes(self) -> int:
        """Size of the regions that were written to."""
        return sum(
            view.nbytes for view, _ in {key: pair for call in self._calls for key, pair in call.items()}.values()
        )

    @property
    def storages(self) -> Collection[int]:
        """``storage_key`` of every storage that was written to."""
        return {region[0] for call in self._calls for region in call}


class _Room:
    """Host memory for copies, allocated in large blocks outside of the heap. Thread-safe.

    Staged pieces have the same sizes but are short-lived: allocated between them, copies would fragment the heap.
    """

    size = 64 << 20
    aligned = 64

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free = torch.empty(0, dtype=torch.uint8)

    def for_values_of(self, view: torch.Tensor) -> torch.Tensor:
        """An uninitialized contiguous host tensor with the shape and dtype of ``view``."""
        size = -(-view.nbytes // self.aligned) * self.aligned
        # Tensors made in inference mode can be written to only in that mode.
        with self._lock, torch.inference_mode(mode=False):
            if size > len(self._free):
                self._free = _block(max(self.size, size))
            found, self._free = self._free[: view.nbytes], self._free[size:]
            return found.view(view.dtype).view(view.shape)


def _block(size: int) -> torch.Tensor:
    """Memory in large pages where the system has some: with small ones, faults would take longer than the copies."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _put_back(kept: dict[Region, tuple[torch.Tensor, torch.Tensor]]) -> None:
    # Tensors made in inference mode can be written to only in that mode, where all others can be as well.
    with torch.inference_mode():
        for view, old in reversed(kept.values()):
            view.copy_(old)


class UndoableQuantizer:
    """Wraps a ``UnitQuantizer``, and keeps what it overwrites.

    Args:
        quantizer: is wrapped.
        scales: of all units. They are small, and kept together: on a device each copy to the host is awaited.
        undo: keeps the values.
    """

    def __init__(self, quantizer: UnitQuantizer, scales: torch.Tensor, undo: UndoLog) -> None:
        self._quantizer = quantizer
        self._scales = scales
        self._undo = undo

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | float:
        """As the quantizer's own."""
        self._undo.keep(weight, self._scales)
        return self._quantizer.quantize(pieces, weight, scale)

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As the quantizer's own."""
        self._undo.keep(weight, self._scales)
        return self._quantizer.quantize_run(values, weight, scale)

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        """As the quantizer's own."""
        return self._quantizer.could_be(piece, weight, scale)


class Bindings:
    """A snapshot of the parameters and buffers of each module, to restore those that upstream replaces."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._held = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]

    def put_back(self) -> None:
        """Restore each module's parameters and buffers."""
        for module, parameters, buffers in self._held:
            module._parameters = parameters
            module._buffers = buffers
