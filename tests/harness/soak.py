# SPDX-License-Identifier: Apache-2.0
"""Load a model, or update its weights, again and again in one process and watch what that leaves."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.loads.job import LoadJob
from workbench.loads.loads import free_port

from harness.load_series import LoadSeries, series_process, streaming_threads
from sglang_overlay.settings import MODE_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable

    from workbench.loads.updates import Update


@dataclass(frozen=True)
class Held:
    """What the process holds after a cycle: anonymous memory in bytes, and numbers of the others."""

    memory: int
    tensors: int
    threads: int
    files: int


def soak(checkpoint: Path, folder: Path, loads: int) -> list[Held]:
    """What is held after each of `loads` streaming loads, the model let go each time."""
    return _measured(_load_again_and_again, folder, checkpoint, loads)


def soak_updates(checkpoint: Path, updates: tuple[Update, ...], folder: Path, cycles: int) -> list[Held]:
    """What is held after each of `cycles` rounds of `updates` of one streamed model."""
    return _measured(_update_again_and_again, folder, checkpoint, updates, cycles)


def _measured(target: Callable[..., None], folder: Path, *arguments: Any) -> list[Held]:
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "memory.json"
    with series_process(target, folder / "log.txt", *arguments, results) as process:
        process.join()
    if process.exitcode:
        raise RuntimeError(f"the soak ended with exit code {process.exitcode}: {folder / 'log.txt'}")
    return [Held(**found) for found in json.loads(results.read_text())]


def _load_again_and_again(checkpoint: Path, loads: int, results: Path) -> None:
    from workbench.loads.job import changed_environ

    series = LoadSeries(checkpoint)

    def cycles() -> Iterator[Held]:
        for _ in range(loads):
            series.load(checkpoint)
            yield _held()

    with changed_environ({MODE_VARIABLE: "require"}):
        _conclude([*cycles()], results)


def _update_again_and_again(checkpoint: Path, updates: tuple[Update, ...], cycles: int, results: Path) -> None:
    from workbench.loads.job import changed_environ
    from workbench.loads.load_worker import build_runner
    from workbench.loads.updates import run

    found = []
    with changed_environ({MODE_VARIABLE: "require"}):
        runner = build_runner(LoadJob(checkpoint), rank=0, port=free_port())
        for _ in range(cycles):
            failed = [done.message for done in (run(runner, update) for update in updates) if not done.success]
            if failed:
                raise RuntimeError(f"updates failed: {failed}")
            found.append(_held())
    _conclude(found, results)


def _held() -> Held:
    import torch
    from workbench.loads.devices import release_host_memory

    from sglang_overlay.observe.memory import host_meter

    release_host_memory()
    meter = host_meter()
    memory = meter.read()
    meter.close()
    tensors = sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())
    threads, files = (len([*Path("/proc/self", kind).iterdir()]) for kind in ("task", "fd"))
    return Held(memory, tensors, threads, files)


def _conclude(found: list[Held], results: Path) -> None:
    if streaming_threads():
        raise RuntimeError(f"threads left: {streaming_threads()}")
    results.write_text(json.dumps([asdict(held) for held in found]))
