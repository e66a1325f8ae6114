# SPDX-License-Identifier: Apache-2.0
"""Upload tensors to a device through a ring of pinned memory slots.

A copy from pageable memory blocks the calling thread, since the driver moves it piece by piece through its own pinned
memory. Here the calling thread only fills a slot, which the device then fetches asynchronously on a separate copy
stream. So disk reads, copies and quantization overlap, and a caller waits only for a free slot.

This module ensures three things: no slot is written before the copy out of it is done; nobody reads the result before
the copy into it is done; the result's memory is not reused for another copy while it is still read.
:class:`PinnedRing` ensures the first, for any device; its transport ensures the others.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

import torch

from sglang_overlay.core.executor import Executor, executor_for

logger = logging.getLogger(__name__)

SLOTS = 4
SLOT_BYTES = 32 << 20
"""Large enough to keep a link of 50 GB/s busy while a slot is filled; holds eight experts of Qwen3-30B-A3B."""


class Copy(Protocol):
    """A copy that was started."""

    def wait(self) -> None:
        """Block until it is done; raises its error."""


class Transport(Protocol):
    """The device operations that a ring needs. Thread-safe."""

    def slot(self, size: int) -> torch.Tensor:
        """``size`` bytes of host memory that the device can read asynchronously, as uint8."""

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """Contiguous device memory with the shape and dtype of ``like``, which no queued work still uses."""

    def start(self, slot: torch.Tensor, target: torch.Tensor) -> Copy:
        """Start to copy part of a slot into part of a result of ``empty``. Copies complete in the order of calls.

        If this raises, nothing reads the slot.
        """

    def hand_over(self, target: torch.Tensor, last: Copy) -> None:
        """Make work that the calling thread queues from now on wait for ``last``; keep ``target`` until it is done."""


@dataclass
class _Slot:
    memory: torch.Tensor
    copy: Copy | None = None


class PinnedRing:
    """Slots that are filled, copied from and reused, the oldest first.

    A slot belongs to the thread that took it out of ``_free`` until that thread puts it back, together with the copy
    that still reads it; the next thread waits for that copy. Slots are allocated when first needed; ``_lock`` guards
    their number, ``_made``. ``close`` may be called only when there are no more uploads.

    Args:
        transport: the device operations.
        slots: the most copies in flight.
        slot_bytes: size of each slot, at least one element; a larger tensor is copied in parts.
    """

    def __init__(self, transport: Transport, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> None:
        self._transport = transport
        self._count = slots
        self._slot_bytes = slot_bytes
        self._free: SimpleQueue[_Slot] = SimpleQueue()
        self._lock = threading.Lock()
        self._made = 0

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``values`` on the device, for work that this thread queues there.

        ``values`` may change as soon as this returns.
        """
        target = self._transport.empty(values)
        last = None
        for source, part in _parts(values, target, self._slot_bytes):
            last = self._carry(source, part)
        if last is not None:
            self._transport.hand_over(target, last)
        return target

    def close(self) -> None:
        """Wait for all copies and release the slots; raises a failed copy's error. May be called more than once."""
        errors = []
        for _ in range(self._made):
            slot = self._free.get()
            try:
                _finish(slot)
            except BaseException as error:
                errors.append(error)
        self._made = 0
        if errors:
            raise errors[0]

    def _carry(self, source: torch.Tensor, part: torch.Tensor) -> Copy:
        with self._slot() as slot:
            _finish(slot)
            filled = slot.memory[: source.nbytes].view(source.dtype).view(source.shape)
            filled.copy_(source)
            slot.copy = started = self._transport.start(filled, part)
            return started

    @contextlib.contextmanager
    def _slot(self) -> Iterator[_Slot]:
        slot = self._new_slot() or self._free.get()
        try:
            yield slot
        finally:
            self._free.put(slot)

    def _new_slot(self) -> _Slot | None:
        with self._lock:
            if self._made == self._count:
                return None
            slot = _Slot(self._transport.slot(self._slot_bytes))
            self._made += 1
            return slot


def _finish(slot: _Slot) -> None:
    # Dropped first, so that nobody waits again for a copy that failed; its slot is free as after any other.
    copy, slot.copy = slot.copy, None
    if copy is not None:
        copy.wait()


def _parts(values: torch.Tensor, target: torch.Tensor, most: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Matching parts of both tensors, cut along their first dimensions, of at most ``most`` bytes."""
    if values.nbytes <= most or not values.dim():
        if values.numel():
            yield values, target
        return
    rows = most // max(1, math.prod(values.shape[1:]) * values.itemsize)
    if rows:
        yield from zip(values.split(rows), target.split(rows), strict=True)
        return
    for row, out in zip(values, target, strict=True):
        yield from _parts(row, out, most)


class _CudaCopy:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class CudaTransport:
    """Copies to one CUDA device on a separate stream.

    Results are allocated on that stream, so the allocator knows that a copy may write to memory as soon as earlier
    copies are done, however much the caller's stream has queued. ``record_stream`` keeps a result's memory from being
    reused for a later copy while the caller's stream still reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def slot(self, size: int) -> torch.Tensor:
        # The CPU is named, since upstream may have made the GPU the default device.
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            return torch.empty(like.shape, dtype=like.dtype, device=self._device)

    def start(self, slot: torch.Tensor, target: torch.Tensor) -> _CudaCopy:
        # Blocking, not spinning: other threads need the core to fill slots.
        event = torch.cuda.Event(blocking=True)
        try:
            with torch.cuda.stream(self._stream):
                target.copy_(slot, non_blocking=True)
                event.record(self._stream)
        except BaseException:
            self._stream.synchronize()
            raise
        return _CudaCopy(event)

    def hand_over(self, target: torch.Tensor, last: Copy) -> None:
        assert isinstance(last, _CudaCopy)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(last.event)
        target.record_stream(current)


class RingExecutor(Executor):
    """Uploads values to the device through a ring."""

    uploads = True

    def __init__(self, ring: PinnedRing) -> None:
        self._ring = ring

    def to_device(self, values: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        values = self._ring.upload(values) if values.is_cpu else values
        return super().to_device(values, device, dtype)

    def close(self) -> None:
        self._ring.close()


def ring_executor_for(device: torch.device) -> Executor:
    """An executor with a ring to ``device`` if that is a CUDA device; without an index, to the current one."""
    if device.type != "cuda":
        return executor_for(device)
    logger.info("StreamFP8: what is read goes to %s through a pinned ring.", device)
    return RingExecutor(PinnedRing(CudaTransport(with_index(device))))


def with_index(device: torch.device) -> torch.device:
    """``device`` with an index: what ``cuda`` means in this thread may differ in others, such as loader threads."""
    # torch's type stubs do not allow None.
    index: int | None = device.index
    return torch.device(device.type, torch.cuda.current_device()) if index is None else device
