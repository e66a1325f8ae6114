# SPDX-License-Identifier: Apache-2.0
"""Quantize complete units beside the loader, so that reading the next tensor does not wait for them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

import torch

MOST_WORKERS = 8
"""Beyond this, memory bandwidth is the bottleneck."""

_WAITING = 2
"""Jobs that may wait for each worker, so that none is idle while callers bring the next."""


WORTH_HANDING_OVER = 1 << 18
"""Bytes of a source that take about as long to quantize as another thread takes to wake up and get Python's lock."""


class Workers:
    """Runs jobs in worker threads; a caller waits while enough of them are under way.

    So the sources that jobs keep alive are bounded. Callers only enqueue: running jobs inline would stall the other
    loaders on the GIL. Every job computes with one thread: a unit is too small to be worth waking torch's thread team.

    ``_slots`` holds one token for each job that may still be put under way: callers take them, workers put them back.
    ``_errors`` has what jobs have raised, in that order; workers append and whoever asks takes, each in one operation
    on a deque.

    Args:
        workers: number of threads; without any, each job runs where it is submitted.
        smallest: bytes from which on a job is worth submitting.
    """

    def __init__(self, workers: int, smallest: int = WORTH_HANDING_OVER) -> None:
        workers = min(workers, MOST_WORKERS)
        self._smallest = smallest
        self._jobs: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        # Not a semaphore, which is written in Python and takes ten times as long.
        self._slots: SimpleQueue[None] = SimpleQueue()
        for _ in range(workers * (1 + _WAITING)):
            self._slots.put(None)
        self._errors: deque[BaseException] = deque()
        self._threads = _started(workers, self._work)

    def takes(self, size: int) -> bool:
        """Whether a job that reads ``size`` bytes is worth submitting."""
        return size >= self._smallest

    def submit(self, job: Callable[[], Any]) -> None:
        """Run ``job`` soon, or now where there are no workers; what it raises surfaces in ``check``, or here."""
        if not self._threads:
            job()
            return
        self._slots.get()
        self._jobs.put(job)
        if not self._threads:
            # Closed meanwhile: nobody else would do it.
            self._do_left()

    def check(self) -> None:
        """Raise what a job has raised first, once. Certain to know of a job only after ``close``."""
        try:
            error = self._errors.popleft()
        except IndexError:
            return
        self._errors.clear()
        raise error

    def close(self) -> None:
        """Wait for all jobs and end the threads. May be called again."""
        for _ in self._threads:
            self._jobs.put(None)
        for worker in self._threads:
            worker.join()
        self._threads = []
        self._do_left()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._do(job)
            del job

    def _do_left(self) -> None:
        """Do what was submitted while the workers ended."""
        with suppress(Empty):
            while True:
                job = self._jobs.get_nowait()
                if job is not None:
                    self._do(job)

    def _do(self, job: Callable[[], Any]) -> None:
        try:
            job()
        except BaseException as error:
            self._errors.append(error)
        finally:
            self._slots.put(None)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Have torch compute with one thread in this thread, and in those that start meanwhile.

    What a weight loader computes, such as fusing two weights, is not worth a team of threads beside these: its
    members go on spinning for milliseconds when they are done, on the cores that the workers need.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def threads_beside_loader() -> int:
    """As many as torch has; none where that is one."""
    threads = torch.get_num_threads()
    return threads if threads > 1 else 0


def _started(count: int, work: Callable[[], None]) -> list[threading.Thread]:
    """Threads that compute with one thread each, and have begun to ``work``."""
    ready = threading.Barrier(count + 1)

    def run() -> None:
        # A thread takes over the common number when first asked, which must not happen after it has been put back.
        torch.get_num_threads()
        try:
            ready.wait()
        except threading.BrokenBarrierError:
            # Another one could not be started.
            return
        work()

    workers = [threading.Thread(target=run, name=f"streamfp8-{number}", daemon=True) for number in range(count)]
    try:
        with one_thread_each():
            for worker in workers:
                worker.start()
            ready.wait()
    except BaseException:
        ready.abort()
        raise
    return workers
