# SPDX-License-Identifier: Apache-2.0
"""Count the memory of tensors over time: every storage from the operation that creates it until it is freed.

``AllocatedMemory`` counts what an allocator hands out, which limits a GPU. ``TouchedMemory`` counts what has been
written to, as ``RssAnon`` does for a process on the CPU: the system allocates pages when they are first used.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from sglang_overlay.offline.plan.job import DeviceWork

CUDA_BLOCK = 512
"""PyTorch's caching allocator rounds each allocation on a GPU up to a multiple of this many bytes."""

Sample = tuple[int, int]
"""Bytes of the checkpoint read so far, bytes of memory."""


Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """What something took.

    Attributes:
        highest: most bytes held meanwhile, above those held before.
        kept: bytes held afterwards, above those held before.
        work: the device's other work.
    """

    highest: int
    kept: int
    work: DeviceWork


@dataclass
class _Record:
    reference: weakref.ref[torch.UntypedStorage]
    size: int
    counted: int


class Account:
    """Memory of the tensors on one device, now and over the load. Not thread-safe.

    ``samples`` has, for each position in the checkpoint, the highest and the last figure at that position.

    Args:
        device: type of the device whose memory is counted.
        block: allocations are rounded up to a multiple of this many bytes.

    Attributes:
        work: the device's other work: launches, uploads and waits.
    """

    def __init__(self, device: str, block: int = 1) -> None:
        self.held = 0
        self.peak = 0
        self.samples: list[Sample] = [(0, 0)]
        self.device = device
        self.work = DeviceWork()
        self._block = block
        self._read = 0
        self._highest = 0
        self._records: dict[int, _Record] = {}

    def read(self, size: int) -> None:
        """Note that ``size`` more bytes of the checkpoint are about to be loaded."""
        self._close_step()
        self._read += size

    def made(self, tensor: torch.Tensor, *, filled: bool) -> None:
        """Note the result of an operation; ``filled`` says whether it has contents yet. Views are not counted."""
        if tensor.device.type != self.device:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._records:
            return
        size = -(-storage.nbytes() // self._block) * self._block
        record = _Record(weakref.ref(storage, lambda _: self._freed(key)), size, 0)
        self._records[key] = record
        self._count(record, self._counted_when_made(tensor, size, filled))

    def written(self, tensor: torch.Tensor, elements: int) -> None:
        """Note that ``elements`` elements of ``tensor``, which may be a view, have been written to."""
        record = self._records.get(tensor.untyped_storage()._cdata)
        if record is not None:
            self._count(record, min(record.size - record.counted, elements * tensor.element_size()))

    def measured(self, run: Callable[[], Result]) -> tuple[Result, Cost]:
        """Run it, and return its result and what it took."""
        before, held, highest = replace(self.work), self.held, self._highest
        self._highest = held
        result = run()
        meanwhile = self._highest - held
        self._highest = max(highest, self._highest)
        return result, Cost(meanwhile, self.held - held, self.work.minus(before))

    def repeat(self, cost: Cost) -> None:
        """Note something that takes what was measured before, and keeps nothing."""
        self.pulse(cost.highest)
        self.work.add(cost.work)

    def pulse(self, size: int) -> None:
        """Note memory, in bytes, that an operation allocates and frees before it returns."""
        self._change(size)
        self._change(-size)

    def finish(self) -> None:
        """End the timeline."""
        self._close_step()

    def _counted_when_made(self, tensor: torch.Tensor, size: int, filled: bool) -> int:  # noqa: FBT001
        return size

    def _count(self, record: _Record, size: int) -> None:
        record.counted += size
        self._change(size)

    def _freed(self, key: int) -> None:
        self._change(-self._records.pop(key).counted)

    def _change(self, size: int) -> None:
        self.held += size
        self._highest = max(self._highest, self.held)
        self.peak = max(self.peak, self.held)

    def _close_step(self) -> None:
        for value in dict.fromkeys((self._highest, self.held)):
            if self.samples[-1] != (self._read, value):
                self.samples.append((self._read, value))
        self._highest = self.held


class AllocatedMemory(Account):
    """Counts all of a storage from its allocation on."""


class TouchedMemory(Account):
    """Counts the written part of a storage. A part written twice counts twice, up to the storage's size."""

    def _counted_when_made(self, tensor: torch.Tensor, size: int, filled: bool) -> int:  # noqa: FBT001
        return size if filled else 0


class AllocatedLate(AllocatedMemory):
    """Counts quantized memory only when it is filled: layer-granular streaming allocates each layer's then."""

    def _counted_when_made(self, tensor: torch.Tensor, size: int, filled: bool) -> int:  # noqa: FBT001
        return size if filled or tensor.element_size() > 1 else 0
