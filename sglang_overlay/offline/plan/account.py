# SPDX-License-Identifier: Apache-2.0
"""Memory of tensors over time: every storage from the operation that makes it to the moment it is freed.

``AllocatedMemory`` counts what an allocator hands out, which is what limits a GPU. ``TouchedMemory`` counts what has
been written to, which is what ``RssAnon`` sees of a process on the CPU: the system gives pages when they are first
used.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from sglang_overlay.offline.plan.job import DeviceWork

CUDA_BLOCK = 512
"""PyTorch's caching allocator rounds each allocation on a GPU up to a multiple of this many bytes."""

Sample = tuple[int, int]
"""Bytes of the checkpoint read so far, bytes of memory."""


@dataclass
class _Record:
    reference: weakref.ref[torch.UntypedStorage]
    size: int
    counted: int


class Account:
    """What tensors on one device hold, now and over the load. Not for several threads at once.

    ``samples`` has, for each position in the checkpoint, the highest and the last figure at that position.

    Args:
        device: type of the device whose memory counts.
        block: allocations are rounded up to a multiple of this.

    Attributes:
        work: what else is asked of the device.
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
        """Note the result of an operation; ``filled`` says whether it has contents yet. Views count for nothing."""
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
        """Note that so many elements of ``tensor``, which may be a view, have been written to."""
        record = self._records.get(tensor.untyped_storage()._cdata)
        if record is not None:
            self._count(record, min(record.size - record.counted, elements * tensor.element_size()))

    def pulse(self, size: int) -> None:
        """Note memory that an operation takes and gives back before it returns."""
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
    """Counts a storage from its allocation on."""


class TouchedMemory(Account):
    """Counts of a storage what has been written to. A part that is written twice counts twice, up to the whole."""

    def _counted_when_made(self, tensor: torch.Tensor, size: int, filled: bool) -> int:  # noqa: FBT001
        return size if filled else 0


class AllocatedLate(AllocatedMemory):
    """Counts quantized memory when it is filled: who waits for whole layers allocates each layer's then, not before."""

    def _counted_when_made(self, tensor: torch.Tensor, size: int, filled: bool) -> int:  # noqa: FBT001
        return size if filled or tensor.element_size() > 1 else 0
