# SPDX-License-Identifier: Apache-2.0
"""Exports in processes of their own: SGLang's state ends with them, and they can be killed at any byte."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from workbench.loads.loads import process_context

from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.observe.memory import MemorySampler, meter_for
from sglang_overlay.offline.export.run import Exported, export, free_bytes
from sglang_overlay.schemes.choice import parse

_PATIENCE_SECONDS = 300.0
_MEMORY_INTERVAL_MS = 1.0


class ExportKilled(RuntimeError):  # noqa: N818 - reads as what happened
    """The process ended without an answer."""


@dataclass(frozen=True)
class ExportJob:
    """One export.

    Args:
        source: folder of the bf16 checkpoint.
        target: folder to write.
        scheme: as ``--scheme``.
        shard_bytes: most bytes in a file.
        killed_after: the process kills itself, as nothing else can, once it has written so many bytes of weights.
        free: what the disk is said to have free; None asks the disk.
        server_args: further fields of SGLang's ``ServerArgs``.
    """

    source: Path
    target: Path
    scheme: str = "block"
    shard_bytes: int = 1 << 20
    killed_after: int | None = None
    free: int | None = None
    server_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ExportResult:
    """What was exported, and the anonymous memory it took above the start, in bytes."""

    exported: Exported
    peak_bytes: int


def run_export(job: ExportJob) -> ExportResult:
    """Run a job.

    Raises:
        StreamFP8Error: the export's own.
        ExportKilled: it was killed, or took too long.
    """
    context = process_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(_PATIENCE_SECONDS):
            raise ExportKilled(f"no answer within {_PATIENCE_SECONDS:.0f} s")
        answer = ours.recv()
    except EOFError:
        process.join()
        raise ExportKilled(f"ended with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, ExportResult):
        return answer
    raise answer


class _KillingProgress:
    def __init__(self, most: int) -> None:
        self._left = most

    def advance(self, count: int, /) -> None:
        self._left -= count
        if self._left < 0:
            os.kill(multiprocessing.current_process().pid or 0, signal.SIGKILL)

    def close(self) -> None:
        return


def _serve(job: ExportJob, answer: Connection) -> None:
    most = job.killed_after if job.killed_after is not None else 1 << 62
    free = free_bytes if job.free is None else lambda _folder: job.free or 0
    try:
        with MemorySampler(meter_for("cpu"), _MEMORY_INTERVAL_MS) as sampler:
            made = export(
                job.source,
                job.target,
                parse(job.scheme, "--scheme"),
                job.shard_bytes,
                job.server_args,
                lambda _total: _KillingProgress(most),
                free,
            )
        answer.send(ExportResult(made, sampler.usage.peak_above_start))
    except StreamFP8Error as error:
        answer.send(error)
