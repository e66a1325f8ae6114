"""Where an architecture's tiny checkpoint comes from, and the machine and job that load it."""

from __future__ import annotations

import hashlib
import inspect
import json
import threading
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadWorkers
from workbench.quality import families, published
from workbench.quality.architectures import PUBLISHED


def gpu_of(architecture: str) -> str:
    """The stand-in GPU on which the architecture is loaded; empty: the CPU."""
    return PUBLISHED[architecture].gpu if architecture in PUBLISHED else families.GPUS.get(architecture, "")


def made_of(architecture: str) -> str:
    """Identifies the data that the architecture's checkpoint is made of."""
    known = PUBLISHED.get(architecture)
    if known is None:
        data = families.data(architecture)
    else:
        data = {
            **asdict(known),
            "config": known.written_config(architecture),
            "beside": known.beside and made_of(known.beside),
        }
    text = json.dumps(data, sort_keys=True, default=_source)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _source(value: object) -> object:
    if isinstance(value, partial):
        return [_source(value.func), value.args, value.keywords]
    return inspect.getsource(value) if inspect.isfunction(value) else str(value)


class Making:
    """Makes checkpoints, and keeps processes that load them, on the CPU and on stand-in GPUs. For one thread.

    Args:
        folder: of checkpoints; those that exist, of the same data, are not made again.
        logs: folder of the processes' logs.
    """

    _building: ClassVar[defaultdict[str, threading.Lock]] = defaultdict(threading.Lock)
    """Held while a checkpoint is made: drafts of several threads may need the same target's."""

    def __init__(self, folder: Path, logs: Path) -> None:
        self._folder, self._logs = folder, logs
        self._stack = ExitStack()
        self._on = cache(self._start)

    def __enter__(self) -> Making:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def workers(self, architecture: str) -> LoadWorkers:
        """The processes that load the architecture."""
        return self._on(gpu_of(architecture))

    def job(self, architecture: str) -> LoadJob:
        """A load of the architecture's checkpoint, which is made first.

        Raises:
            Exception: the checkpoint cannot be made, with the reason.
        """
        with self._building[architecture]:
            known, folder = PUBLISHED.get(architecture), self._folder / made_of(architecture)
            if known is None:
                path = families.build(architecture, folder)
                job = LoadJob(path, server_args=families.server_args(architecture))
                return published.on(gpu_of(architecture), job)
            beside = self.job(known.beside).checkpoint if known.beside else None
            path = published.build(architecture, known, folder, self.workers(architecture), beside)
            return known.job(path)

    def _start(self, gpu: str) -> LoadWorkers:
        if not gpu:
            return self._stack.enter_context(LoadWorkers(self._logs))
        from standin.gpus import environ

        return self._stack.enter_context(LoadWorkers(self._logs / gpu, environ(gpu), "spawn"))
