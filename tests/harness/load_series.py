# SPDX-License-Identifier: Apache-2.0
"""Many loads of one small model in one process: what 500 damaged checkpoints or 200 loads in a row need.

``LoadWorkers`` sets all of SGLang up for each job and gives a process up with a job that fails.
Here SGLang is set up once, and each load is SGLang's own ``get_model_loader(...).load_model(...)``, which leaves
nothing behind when it fails.

    with series_process(target, *arguments) as process: ...

runs ``target(*arguments)`` in a process that has SGLang imported and whose output goes to a file.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.loads.job import LoadJob
from workbench.loads.loads import free_port, process_context

from sglang_overlay.settings import MODE_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.process import BaseProcess

    from workbench.loads.fingerprints import TensorPrint


@dataclass(frozen=True)
class Attempt:
    """What became of one load.

    Args:
        prints: of all tensors, where it loaded.
        error: what it raised, if it did.
        threads: workers of streaming that were left running.
        held: bytes of staging memory that were not given back.
        log: warnings of any logger, and everything of the overlay's.
    """

    prints: dict[str, TensorPrint] | None
    error: BaseException | None
    threads: tuple[str, ...]
    held: int
    log: tuple[str, ...]


class LoadSeries:
    """Loads of checkpoints that have one config. To be used in a process of its own, by one thread."""

    def __init__(self, checkpoint: Path) -> None:
        from workbench.loads.load_worker import build_runner

        runner = build_runner(LoadJob(checkpoint, streaming="0"), rank=0, port=free_port())
        self._model_config = runner.model_config
        self._load_config = runner.load_config

    def attempt(self, checkpoint: Path, streaming: str, **environ: str) -> Attempt:
        """Load `checkpoint` with ``SGLANG_STREAMFP8=streaming``, and let go of it."""
        from workbench.loads.fingerprints import model_prints
        from workbench.loads.load_worker import job_environ

        prints, error = None, None
        with job_environ({MODE_VARIABLE: streaming, **environ}) as log:
            try:
                prints = model_prints(self.load(checkpoint))
            except KeyboardInterrupt:
                raise
            except BaseException as raised:  # A panic in the safetensors library is no Exception.
                error = raised
        attempt = Attempt(prints, error, streaming_threads(), staging_held(), tuple(log))
        _let_go(error)
        return attempt

    def load(self, checkpoint: Path) -> Any:
        """The loaded model, under the environment as it is."""
        from sglang.srt.configs.device_config import DeviceConfig
        from sglang.srt.model_loader.loader import get_model_loader

        self._model_config.model_path = str(checkpoint)
        loader = get_model_loader(self._load_config, self._model_config)
        return loader.load_model(model_config=self._model_config, device_config=DeviceConfig("cpu"))


def _let_go(error: BaseException | None) -> None:
    """End, here and now, what a failed load has left suspended: upstream's generators with their thread pools.

    Left to the garbage collector, that waits for those threads at any moment, and for ever where the moment is the
    start of another thread: ``threading`` holds then what a thread needs in order to end.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def streaming_threads() -> tuple[str, ...]:
    """Names of the workers of streaming that are running."""
    return tuple(sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("streamfp8-")))


def staging_held() -> int:
    """Bytes of staging memory in all loads that something still refers to, as a failed one's traceback does."""
    from sglang_overlay.core.staging import StagingAccount

    return sum(found.held for found in gc.get_objects() if isinstance(found, StagingAccount))


@contextlib.contextmanager
def series_process(target: Callable[..., None], log: Path, *arguments: Any) -> Iterator[BaseProcess]:
    """A process that runs ``target(*arguments)``, forked where SGLang is imported already; killed at the end."""
    process = process_context("forkserver").Process(target=_run, args=(target, str(log), *arguments), daemon=True)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.kill()
        process.join()


def _run(target: Callable[..., None], log: str, *arguments: Any) -> None:
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    target(*arguments)
