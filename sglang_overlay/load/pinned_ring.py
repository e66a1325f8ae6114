# SPDX-License-Identifier: Apache-2.0
"""Carry tensors to a device through a few pieces of pinned memory that are used in turn.

A copy out of ordinary memory holds up the thread that asks for it, since the driver moves it piece by piece through
pinned memory of its own. Here the calling thread only fills a slot; the device fetches it by itself, on a stream for
copies alone. So disk reads, copies and quantization overlap, and a caller waits for nothing but a free slot.

Three things must hold, and are this module's: a slot is not written before the copy out of it is done; nobody reads the
result before the copy into it is done; the result's memory is not given to another copy while it is still read. The
first is :class:`PinnedRing`'s, on whatever device; the others are its transport's.
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
"""Large enough to keep a link of 50 GB/s busy while a slot is filled, and eight experts of Qwen3-30B-A3B."""


class Copy(Protocol):
    """A copy that was started."""

    def wait(self) -> None:
        """Block until it is done; raises what it failed with."""


class Transport(Protocol):
    """What a ring needs of a device. Any thread may call."""

    def slot(self, size: int) -> torch.Tensor:
        """``size`` bytes of host memory that the device reads by itself, as uint8."""

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """Contiguous memory on the device, shape and dtype as ``like``, which nothing queued there still uses."""

    def start(self, slot: torch.Tensor, target: torch.Tensor) -> Copy:
        """Begin to copy part of a slot into part of what ``empty`` gave; copies are done in the order of calls.

        Where this raises, nothing reads the slot.
        """

    def hand_over(self, target: torch.Tensor, last: Copy) -> None:
        """Let work that the calling thread queues from now on wait for ``last``; keep ``target`` until it is done."""


@dataclass
class _Slot:
    memory: torch.Tensor
    copy: Copy | None = None


class PinnedRing:
    """Slots that are filled, copied from and used again, the oldest first.

    A slot belongs to the thread that took it out of ``_free`` until it is put back, with the copy that still reads it:
    who takes it next waits for that. Each slot's memory is taken when it is first needed; ``_lock`` guards ``_made``,
    how many there are. ``close`` is for when nothing is uploaded any more.

    Args:
        transport: the device's side.
        slots: how many copies may be under way.
        slot_bytes: of each, an element's at least; a larger tensor goes in parts.
    """

    def __init__(self, transport: Transport, slots: int = SLOTS, slot_bytes: int = SLOT_BYTES) -> None:
        self._transport = transport
        self._count = slots
        self._slot_bytes = slot_bytes
        self._free: SimpleQueue[_Slot] = SimpleQueue()
        self._lock = threading.Lock()
        self._made = 0

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """The same values on the device, contiguous, in their own dtype; for work that this thread queues there.

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
        """Wait for all copies and let go of the slots; raises what a copy failed with. May be called again."""
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
    # Forgotten first: a copy that failed is not waited for again, and its memory is as free as after any other.
    copy, slot.copy = slot.copy, None
    if copy is not None:
        copy.wait()


def _parts(values: torch.Tensor, target: torch.Tensor, most: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both cut alike, along their first dimensions, into parts of at most ``most`` bytes."""
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
    """Copies to one CUDA device on a stream of their own.

    Results are allocated for that stream: the allocator then knows that a copy may write to memory as soon as earlier
    copies are done, however much the caller's stream has queued. ``record_stream`` keeps a result from being given to
    a later copy while the caller's stream still reads it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def slot(self, size: int) -> torch.Tensor:
        # Named, since upstream may have made the device the default one.
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        with torch.cuda.stream(self._stream):
            return torch.empty(like.shape, dtype=like.dtype, device=self._device)

    def start(self, slot: torch.Tensor, target: torch.Tensor) -> _CudaCopy:
        # Blocking: who waits for a slot must not keep a core busy that fills other slots.
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
    """Brings what is read to the device through a ring."""

    uploads = True

    def __init__(self, ring: PinnedRing) -> None:
        self._ring = ring

    def to_device(self, values: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        values = self._ring.upload(values) if values.is_cpu else values
        return super().to_device(values, device, dtype)

    def close(self) -> None:
        self._ring.close()


def ring_executor_for(device: torch.device) -> Executor:
    """An executor with a ring to ``device``, where that is a CUDA device; without an index, the current one."""
    if device.type != "cuda":
        return executor_for(device)
    logger.info("StreamFP8: what is read goes to %s through a pinned ring.", device)
    return RingExecutor(PinnedRing(CudaTransport(with_index(device))))


def with_index(device: torch.device) -> torch.device:
    """Which device ``cuda`` is in this thread: in others, such as a model's loader threads, it may be another."""
    # torch's types do not know that there may be none.
    index: int | None = device.index
    return torch.device(device.type, torch.cuda.current_device()) if index is None else device
