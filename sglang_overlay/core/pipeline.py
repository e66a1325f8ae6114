# SPDX-License-Identifier: Apache-2.0
"""Quantize complete units beside the loader, so that reading the next tensor does not wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

MOST_WORKERS = 8
"""More threads than this wait for memory, not for each other."""

_WAITING = 2
"""Jobs that may wait for each worker, so that none is idle while the caller does a job itself."""


class Pipeline:
    """Runs jobs in worker threads; a caller that finds enough of them under way does its job itself.

    So a machine's cores are busy without more threads than cores, and the sources that jobs keep alive are bounded.
    Every job computes with one thread: a unit is too small to be worth waking torch's thread team for.

    ``_slots`` counts the jobs that may still be put under way. ``_error`` is written by workers and read by whoever
    asks, each in one assignment.

    Args:
        workers: number of threads; without any, each job runs where it is submitted.
    """

    def __init__(self, workers: int) -> None:
        workers = min(workers, MOST_WORKERS)
        self._threads = torch.get_num_threads()
        self._pool = _start(workers, self._threads) if workers else None
        self._slots = threading.Semaphore(workers * (1 + _WAITING))
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], Any]) -> None:
        """Run ``job`` soon, or now.

        Raises:
            BaseException: what this or an earlier job raised.
        """
        self.check()
        if self._pool is None:
            job()
        elif self._slots.acquire(blocking=False):
            self._pool.submit(self._run, job)
        else:
            with self._one_thread():
                job()

    def check(self) -> None:
        """Raise what a job has raised, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Wait for all jobs and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _run(self, job: Callable[[], Any]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error
        finally:
            self._slots.release()

    @contextmanager
    def _one_thread(self) -> Iterator[None]:
        torch.set_num_threads(1)
        try:
            yield
        finally:
            # Not what this thread had before: that may be the 1 which another caller has set for new threads.
            torch.set_num_threads(self._threads)


def _start(workers: int, threads: int) -> ThreadPoolExecutor:
    """A pool whose threads are all there and compute with one thread each."""
    ready = threading.Barrier(workers + 1)

    def prepare() -> None:
        # Asking first: a thread takes over the common number when first asked, which must not happen afterwards.
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="streamfp8", initializer=prepare)
    for _ in range(workers):
        pool.submit(int)
    ready.wait()
    # torch keeps the number per thread, and what it gives new threads in one place: this puts the latter back.
    torch.set_num_threads(threads)
    return pool
