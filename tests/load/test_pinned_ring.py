# SPDX-License-Identifier: Apache-2.0
"""What a ring owes its callers, with a device that is a thread: it copies late, in order, and can fail.

The CUDA side of it runs in ``ci/gpu_check``'s step ``ring``.
"""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
from core import pipelined
from core.pipelined import InThreads
from core.streams import per_channel, per_expert, per_tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_overlay.cpu_reference.workers import Workers
from sglang_overlay.load.pinned_ring import PinnedRing, RingExecutor, with_index

DTYPES = [torch.bfloat16, torch.float32, torch.uint8, torch.float64]


class Copied:
    """A copy that the device's thread will have done, or failed at."""

    def __init__(self) -> None:
        self._done = threading.Event()
        self.error: Exception | None = None

    def finish(self, error: Exception | None) -> None:
        self.error = error
        self._done.set()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        assert self._done.wait(20), "the device never came to this copy"
        if self.error is not None:
            raise self.error


class DeviceThread:
    """Copies one after another, each only when ``gate`` is open and after a pause; reads a slot no sooner than that."""

    def __init__(self, pause: float = 0.0, fails_at: int = -1) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.slots: list[torch.Tensor] = []
        self.copies: list[Copied] = []
        self.handed: list[Copied] = []
        self._fails_at = fails_at
        self._pause = pause
        self._random = random.Random(0)
        self._queue: SimpleQueue[tuple[torch.Tensor, torch.Tensor, Copied] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def slot(self, size: int) -> torch.Tensor:
        self.slots.append(torch.empty(size, dtype=torch.uint8))
        return self.slots[-1]

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype)

    def start(self, slot: torch.Tensor, target: torch.Tensor) -> Copied:
        with self._lock:
            copied = Copied()
            self.copies.append(copied)
            self._queue.put((slot, target, copied))
            return copied

    def hand_over(self, target: torch.Tensor, last: Copied) -> None:
        self.handed.append(last)

    def end(self) -> None:
        self.gate.set()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        number = 0
        while (order := self._queue.get()) is not None:
            slot, target, copied = order
            self.gate.wait(20)
            time.sleep(self._random.random() * self._pause)
            if number == self._fails_at:
                copied.finish(RuntimeError("the copy failed"))
            else:
                target.copy_(slot)
                copied.finish(None)
            number += 1


@pytest.fixture
def device():
    made = DeviceThread()
    yield made
    made.end()


def matrices(generator: torch.Generator, shapes, dtype):
    for shape in shapes:
        yield torch.randint(0, 200, shape, generator=generator).to(dtype)


@given(
    shapes=st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=12),
    slots=st.integers(1, 4),
    slot_bytes=st.integers(1, 16).map(lambda eighths: 8 * eighths),
    threads=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_what_arrives_is_what_was_sent_however_late_the_device_reads(shapes, slots, slot_bytes, threads, dtype, seed):
    device = DeviceThread(pause=0.001)
    ring = PinnedRing(device, slots, slot_bytes)
    sent = list(matrices(torch.Generator().manual_seed(seed), shapes, dtype))
    wanted = [tensor.clone() for tensor in sent]

    def upload(tensor):
        arrived = ring.upload(tensor)
        tensor.fill_(77)  # The caller may use its memory again.
        return arrived

    with ThreadPoolExecutor(threads) as pool:
        arrived = list(pool.map(upload, sent))
    ring.close()
    assert all(map(torch.equal, arrived, wanted))
    assert len(device.slots) <= slots
    device.end()


@pytest.mark.parametrize("view", [lambda m: m.t(), lambda m: m[:, 3:7], lambda m: m[::2], lambda m: m[0].expand(5, 16)])
def test_views_arrive_contiguous(device, view):
    ring = PinnedRing(device, 2, 64)
    values = view(torch.arange(256, dtype=torch.float32).view(16, 16))
    arrived = ring.upload(values)
    ring.close()
    assert torch.equal(arrived, values)
    assert arrived.is_contiguous()


def test_no_slot_is_filled_before_the_copy_out_of_it_is_done(device):
    ring = PinnedRing(device, 2, 64)
    device.gate.clear()
    first = [ring.upload(torch.full((16,), float(number))) for number in range(2)]
    third = threading.Thread(target=ring.upload, args=(torch.full((16,), 9.0),))
    third.start()
    third.join(0.2)
    assert third.is_alive()
    assert [float(slot.view(torch.float32)[0]) for slot in device.slots] == [0.0, 1.0]
    device.gate.set()
    third.join(20)
    ring.close()
    assert [float(tensor[0]) for tensor in first] == [0.0, 1.0]


def test_an_upload_does_not_wait_for_its_own_copy(device):
    ring = PinnedRing(device, 1, 64)
    device.gate.clear()
    ring.upload(torch.zeros(16))
    assert not device.copies[0].is_done


def test_the_callers_work_waits_for_the_last_part(device):
    PinnedRing(device, 2, 64).upload(torch.zeros(100))
    assert len(device.copies) == 7
    assert device.handed == [device.copies[-1]]


def test_a_tensor_without_values_costs_no_slot(device):
    assert PinnedRing(device).upload(torch.empty(0, 5)).shape == (0, 5)
    assert device.slots == device.copies == device.handed == []


def test_closing_waits_for_all_copies(device):
    ring = PinnedRing(device, 3, 64)
    device.gate.clear()
    arrived = [ring.upload(torch.full((16,), float(number))) for number in range(3)]
    threading.Timer(0.1, device.gate.set).start()
    ring.close()
    assert all(copied.is_done for copied in device.copies)
    assert [float(tensor[0]) for tensor in arrived] == [0.0, 1.0, 2.0]
    ring.close()


@pytest.mark.parametrize("uploads", [2, 3])
def test_a_copy_that_fails_is_an_error_of_the_next_user_of_its_slot_or_of_closing(uploads):
    device = DeviceThread(fails_at=0)
    ring = PinnedRing(device, 2, 64)

    def use():
        for _ in range(uploads):
            ring.upload(torch.zeros(16))
        ring.close()

    with pytest.raises(RuntimeError, match="the copy failed"):
        use()
    ring.close()  # Nothing is held back by the failure, and it surfaces once.
    device.end()


def test_a_slot_survives_a_failure_to_fill_it(device):
    ring = PinnedRing(device, 1, 64)
    with pytest.raises(RuntimeError):
        ring.upload(torch.zeros(4, device="meta"))
    assert torch.equal(_after(ring, ring.upload(torch.ones(4))), torch.ones(4))


def test_a_slot_survives_a_copy_that_cannot_be_started(device, monkeypatch):
    ring = PinnedRing(device, 1, 64)
    with monkeypatch.context() as patch:
        patch.setattr(device, "start", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ring.upload(torch.ones(4))
    assert torch.equal(_after(ring, ring.upload(torch.ones(4))), torch.ones(4))


class Uploading(InThreads, RingExecutor):
    """Threads, and a ring."""

    def __init__(self, upload):
        super().__init__(Workers(2, smallest=0))
        self._ring = SimpleNamespace(upload=upload)


def _after(ring: PinnedRing, arrived: torch.Tensor) -> torch.Tensor:
    ring.close()
    return arrived


@pytest.mark.parametrize("make", [per_expert, per_channel, per_tensor], ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_parameter_comes_out_the_same_through_a_ring(device, make, dtype, monkeypatch):
    pipelined.use(monkeypatch)
    ring, seen = PinnedRing(device, 2, 256), []

    def upload(values):
        arrived = ring.upload(values)
        device.handed[-1].wait()  # This device's work is the caller's own, which queues nothing.
        seen.append((values.dtype, values.numel()))
        return arrived

    monkeypatch.setattr(pipelined, "EXECUTOR", Uploading(upload))
    streamed = make((4, 24, 16) if make is per_expert else (24, 16))
    weight = torch.randn(streamed.placeholder.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    # In two writes each, so that one half is staged and the other completes it.
    for place, values in zip(streamed.placeholder.chunk(2, -2), weight.chunk(2, -2), strict=True):
        streamed.stream.write(place, values)
    assert streamed.stream.settle() == []
    assert streamed.equals(weight.to(torch.bfloat16))
    # Each element once: what was staged in the dtype of the parameter, the rest in its own. No row waits for another.
    assert {found for found, _ in seen} == ({dtype} if make is per_channel else {torch.bfloat16, dtype})
    assert sum(elements for _, elements in seen) == weight.numel()
    ring.close()


def test_device_without_an_index_is_the_current_one_of_the_thread_that_asks(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert with_index(torch.device("cuda")) == torch.device("cuda", 1)
    assert with_index(torch.device("cuda", 3)) == torch.device("cuda", 3)
