# SPDX-License-Identifier: Apache-2.0
"""Quantize complete units beside the loader, so that reading the next tensor does not wait for them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch

MOST_WORKERS = 8
"""More threads than this wait for memory, not for each other."""

_WAITING = 2
"""Jobs that may wait for each worker, so that none is idle while the caller does a job itself."""


WORTH_HANDING_OVER = 1 << 18
"""Bytes of a source that take about as long to quantize as another thread takes to wake up and get Python's lock."""


class Pipeline:
    """Runs jobs in worker threads; a caller that finds enough of them under way does its job itself, one at a time.

    So a machine's cores are busy without more threads than cores, however many call, and the sources that jobs keep
    alive are bounded. Every job computes with one thread: a unit is too small to be worth waking torch's thread team
    for.

    ``_slots`` counts the jobs that may still be put under way. A caller holds ``_calling`` while it does a job, which
    waits for nothing. ``_errors`` has what jobs have raised, in that order; workers append and whoever asks takes, each
    in one operation on a deque.

    Args:
        workers: number of threads; without any, each job runs where it is submitted.
        smallest: bytes from which on a job is worth submitting.
    """

    def __init__(self, workers: int, smallest: int = WORTH_HANDING_OVER) -> None:
        workers = min(workers, MOST_WORKERS)
        self._smallest = smallest
        self._threads = torch.get_num_threads()
        self._jobs: SimpleQueue[Callable[[], Any] | None] = SimpleQueue()
        self._slots = threading.Semaphore(workers * (1 + _WAITING))
        self._calling = threading.Lock()
        self._errors: deque[BaseException] = deque()
        self._workers = self._start(workers)

    def takes(self, size: int) -> bool:
        """Whether a job that reads ``size`` bytes is worth submitting."""
        return size >= self._smallest

    def submit(self, job: Callable[[], Any]) -> None:
        """Run ``job`` soon, or now; what it raises surfaces in ``check``, or here."""
        if not self._workers:
            job()
        elif self._slots.acquire(blocking=False):
            self._jobs.put(job)
        else:
            with self._calling, self._one_thread():
                job()

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
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()
        self._workers = []

    def _work(self, ready: threading.Barrier) -> None:
        # Asking first: a thread takes over the common number when first asked, which must not happen afterwards.
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.wait()
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException as error:
                self._errors.append(error)
            finally:
                del job
                self._slots.release()

    def _start(self, count: int) -> list[threading.Thread]:
        ready = threading.Barrier(count + 1)
        workers = [
            threading.Thread(target=self._work, args=(ready,), name=f"streamfp8-{number}", daemon=True)
            for number in range(count)
        ]
        for worker in workers:
            worker.start()
        ready.wait()
        # torch keeps the number per thread, and what it gives new threads in one place: this puts the latter back.
        torch.set_num_threads(self._threads)
        return workers

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        torch.set_num_threads(1)
        try:
            yield
        finally:
            # Not what this thread had before: that may be the 1 which another caller has set for new threads.
            torch.set_num_threads(self._threads)
