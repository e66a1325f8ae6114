# SPDX-License-Identifier: Apache-2.0
"""Processes that plan: SGLang is imported once, and every job has a process of its own.

SGLang keeps tables of an earlier model (rotary embeddings), which a later one would find and not allocate. And a plan
must not depend on the machine: no GPU is visible to these processes, and streaming is on whatever the user's settings.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pkgutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.plan.job import Job, PlannedLoad
from sglang_overlay.settings import MODE_VARIABLE, REPORT_VARIABLE

_ENVIRON = {"CUDA_VISIBLE_DEVICES": "", MODE_VARIABLE: "1", REPORT_VARIABLE: "", "SGLANG_PLUGINS": ""}
_LAST_LINES = 15


class PlanError(StreamFP8Error):
    """A rank could not be planned; the message has what the load said."""


@dataclass(frozen=True)
class _Failure:
    job: Job
    known: bool
    text: str


class Planners:
    """Runs jobs beside one another, ``workers`` at a time.

        with Planners(2) as planners:
            for load in planners.run(jobs): ...

    Args:
        workers: processes that plan at the same time.
        task: ``module:function`` that does a job; another one than the planner's own to see what it would report if
            the code it runs were different.
    """

    def __init__(self, workers: int, task: str = "sglang_overlay.plan.simulate:simulate") -> None:
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
        # It may be in the middle of jobs that nobody waits for any more.
        self._process.terminate()
        self._process.join()
        self._log.close()

    def run(self, jobs: Iterable[Job]) -> Iterator[PlannedLoad]:
        """Results in the order of the jobs, each as soon as it and those before it are there.

        Raises:
            PlanError: a job failed; those after it are not waited for.
        """
        listed = list(jobs)
        self._pipe.send(listed)
        for _ in listed:
            try:
                found = self._pipe.recv()
            except EOFError:
                raise PlanError(f"the planning process ended:\n{self._tail()}") from None
            if isinstance(found, _Failure):
                raise PlanError(self._describe(found))
            yield found

    def _describe(self, failure: _Failure) -> str:
        if failure.known:
            return failure.text
        return f"rank {failure.job.rank} of {failure.job.model} could not be planned:\n{failure.text}"

    def _tail(self) -> str:
        return "\n".join(Path(self._log.name).read_text(errors="replace").splitlines()[-_LAST_LINES:])


def _serve(orders: Connection, workers: int, task: str, log: str) -> None:
    """The process that imports SGLang and forks one process a job."""
    os.environ.update(_ENVIRON)
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
    """Send what comes of each job, up to the first that fails; leaving the block ends those that are under way."""
    context = multiprocessing.get_context("fork")
    with context.Pool(workers, maxtasksperchild=1) as pool:
        for found in pool.imap(partial(_do, task), jobs, chunksize=1):
            orders.send(found)
            if isinstance(found, _Failure):
                return


def _read_checkpoints(jobs: list[Job]) -> None:
    """Before processes are forked, each of which would else read them, or build transformers' model, again."""
    from sglang_overlay.plan.simulate import checkpoint_of

    for model, from_config in {(job.model, job.from_config): None for job in jobs}:
        # What is wrong with one is for the job to say.
        with contextlib.suppress(Exception):
            checkpoint_of(model, from_config)


def _import_sglang() -> None:
    import importlib

    import sglang.srt.plugins

    # As in every process SGLang starts: before modules that take names from those which plugins patch.
    sglang.srt.plugins.load_plugins()
    importlib.import_module("sglang.srt.models.registry")
    importlib.import_module("sglang_overlay.plan.simulate")


def _do(task: str, job: Job) -> PlannedLoad | _Failure:
    try:
        found: PlannedLoad = pkgutil.resolve_name(task)(job)
        return found
    except StreamFP8Error as error:
        return _Failure(job, True, str(error))
    except Exception:
        traceback.print_exc(file=sys.stderr)
        return _Failure(job, False, "".join(traceback.format_exc().splitlines(keepends=True)[-_LAST_LINES:]))
