# SPDX-License-Identifier: Apache-2.0
"""Quantize complete units beside the loader, so that reading the next tensor does not wait for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

MOST_WORKERS = 8
"""More threads than this wait for memory, not for each other."""


class Pipeline:
    """Runs jobs in worker threads, as many at a time as there are workers and one more waiting.

    Each worker computes with one thread of its own: a unit is too small to be worth waking torch's thread team for.
    ``_slots`` bounds the jobs under way. ``_error`` is written by workers and read by whoever asks, each in one
    assignment.

    Args:
        workers: number of threads; without any, each job runs where it is submitted.
    """

    def __init__(self, workers: int) -> None:
        self._pool = _start(min(workers, MOST_WORKERS)) if workers else None
        self._slots = threading.Semaphore(min(workers, MOST_WORKERS) + 1)
        self._error: BaseException | None = None

    def submit(self, job: Callable[[], Any]) -> None:
        """Run ``job`` soon; waits while too many are under way.

        Raises:
            BaseException: what an earlier job raised.
        """
        self.check()
        if self._pool is None:
            job()
            return
        self._slots.acquire()
        self._pool.submit(self._run, job)

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


def _start(workers: int) -> ThreadPoolExecutor:
    """A pool whose threads are all there and compute with one thread each."""
    threads = torch.get_num_threads()
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
