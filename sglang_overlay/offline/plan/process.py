# SPDX-License-Identifier: Apache-2.0
"""Run planning jobs: SGLang is imported once, and each job runs in a forked process.

Separate processes, since SGLang keeps tables of an earlier model (rotary embeddings), which a later one would reuse
instead of allocating. A plan must not depend on the machine, so GPUs are hidden from these processes, and streaming is
on whatever the user's settings.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.hooks import own_process
from sglang_overlay.offline.plan.job import Job, PlannedLoad

_LAST_LINES = 15
_LAST_FRAMES = 3
_PATIENCE_SECONDS = 5.0


class PlanError(StreamFP8Error):
    """A rank could not be planned; the message contains the load's error."""


@dataclass(frozen=True)
class _Failure:
    job: Job
    known: bool
    text: str


class Planners:
    """Runs jobs in parallel, ``workers`` at a time.

        with Planners(2) as planners:
            for load in planners.run(jobs): ...

    Args:
        workers: number of processes that plan at the same time.
        task: ``module:function`` that does a job, by default the planner's own.
    """

    def __init__(self, workers: int, task: str = "sglang_overlay.offline.plan.simulate:simulate") -> None:
        self._workers = workers
        self._task = task

    def __enter__(self) -> Planners:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._log = tempfile.NamedTemporaryFile(prefix="plan-", suffix=".log")
        self._process = context.Process(target=_serve, args=(theirs, self._workers, self._task, self._log.name))
        self._process.start()
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        # It may still be running jobs that nobody waits for any more.
        self._process.terminate()
        self._process.join()
        self._log.close()

    def run(self, jobs: Iterable[Job]) -> Iterator[PlannedLoad]:
        """Results in the order of the jobs, each as soon as it and those before it are done.

        Raises:
            PlanError: a job failed; later ones are not waited for.
        """
        listed = list(jobs)
        self._pipe.send(listed)
        for _ in listed:
            try:
                found = self._pipe.recv()
            except (EOFError, ConnectionResetError):
                raise PlanError(f"the planning process ended:\n{self._tail()}") from None
            if isinstance(found, _Failure):
                raise PlanError(self._describe(found))
            yield found

    def _describe(self, failure: _Failure) -> str:
        if failure.known:
            return failure.text
        return f"rank {failure.job.rank} of {failure.job.model} could not be planned: {failure.text}"

    def _tail(self) -> str:
        return "\n".join(Path(self._log.name).read_text(errors="replace").splitlines()[-_LAST_LINES:])


def _serve(orders: Connection, workers: int, task: str, log: str) -> None:
    """The main function of the process that imports SGLang and forks one process per job."""
    os.environ.update(own_process.ENVIRON)
    opened = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _import_sglang()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            jobs = orders.recv()
            _read_checkpoints(jobs)
            _answer(orders, jobs, task, min(workers, len(jobs)))


def _answer(orders: Connection, jobs: list[Job], task: str, workers: int) -> None:
    """Send each job's result, up to the first failure."""
    results = _InOrder()
    with contextlib.closing(_Forks(task)) as forks:
        waiting = deque(enumerate(jobs))
        while results.given < len(jobs):
            while waiting and len(forks) < workers:
                forks.start(*waiting.popleft())
            results.add(forks.finished())
            for found in results.next():
                orders.send(found)
                if isinstance(found, _Failure):
                    return
            if not _is_awaited():
                return


def _is_awaited() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and parent.is_alive()


class _Forks:
    """The processes of running jobs."""

    def __init__(self, task: str) -> None:
        self._task = task
        self._running: dict[Connection, tuple[int, Job, Any]] = {}

    def __len__(self) -> int:
        return len(self._running)

    def start(self, number: int, job: Job) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_do, args=(self._task, job, theirs), daemon=True)
        process.start()
        theirs.close()
        self._running[ours] = (number, job, process)

    def finished(self) -> Iterator[tuple[int, PlannedLoad | _Failure]]:
        """Numbers and results of jobs that have ended; waits up to ``_PATIENCE_SECONDS`` for one."""
        ready = cast("list[Connection]", connection.wait(list(self._running), timeout=_PATIENCE_SECONDS))
        for pipe in ready:
            number, job, process = self._running.pop(pipe)
            try:
                found = pipe.recv()
            except EOFError:
                process.join()
                found = _Failure(job, known=False, text=f"its process ended with exit code {process.exitcode}")
            yield number, found

    def close(self) -> None:
        for _, _, process in self._running.values():
            process.kill()
            process.join()


class _InOrder:
    """Puts results in the order of their numbers."""

    def __init__(self) -> None:
        self.given = 0
        self._early: dict[int, PlannedLoad | _Failure] = {}

    def add(self, results: Iterable[tuple[int, PlannedLoad | _Failure]]) -> None:
        self._early.update(results)

    def next(self) -> Iterator[PlannedLoad | _Failure]:
        while self.given in self._early:
            self.given += 1
            yield self._early.pop(self.given - 1)


def _read_checkpoints(jobs: list[Job]) -> None:
    """Read them before forking: otherwise each process would read them, or build transformers' model, again."""
    from sglang_overlay.offline.plan.simulate import checkpoint_of

    for model, from_config in {(job.model, job.from_config): None for job in jobs}:
        # The job itself will report the error.
        with contextlib.suppress(Exception):
            checkpoint_of(model, from_config)


def _import_sglang() -> None:
    # Collections while so much is imported take a fifth of the time, and find nothing.
    gc.disable()
    own_process.load_plugins()
    importlib.import_module("sglang.srt.models.registry")
    importlib.import_module("sglang_overlay.offline.plan.simulate")
    # Those in the forked processes would walk, and so copy, everything that is imported.
    gc.freeze()
    gc.enable()


def _do(task: str, job: Job, answer: Connection) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        answer.send(pkgutil.resolve_name(task)(job))
    except StreamFP8Error as error:
        answer.send(_Failure(job, known=True, text=str(error)))
    except Exception as error:
        answer.send(_Failure(job, known=False, text=_in_short(error)))


def _in_short(error: Exception) -> str:
    """The error, and the lines of code that led to it, innermost last."""
    frames = traceback.extract_tb(error.__traceback__)[-_LAST_FRAMES:]
    lines = [f"  {frame.filename}:{frame.lineno}: {frame.line}" for frame in frames]
    return "\n".join([f"{type(error).__name__}: {error}".strip(": "), *lines])
