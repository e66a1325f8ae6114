# SPDX-License-Identifier: Apache-2.0
"""Load a model where the process may not have the memory for it: the kernel refuses what goes beyond a limit."""

from __future__ import annotations

import ctypes
import json
import re
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.load_series import LoadSeries, series_process, staging_held, streaming_threads
from sglang_overlay.settings import MODE_VARIABLE

_SECONDS = 240.0
_M_MMAP_THRESHOLD = -3
"""Of glibc's ``malloc.h``."""


@dataclass(frozen=True)
class Outcome:
    """What became of one load.

    Args:
        allowed: bytes of memory the process might take beyond what it had.
        error: type of what was raised, its text and notes; empty where the model loaded.
        cause: type and text of the error behind that one.
        threads: workers of streaming left running.
        held: bytes of staging not given back.
    """

    allowed: int
    error: str
    cause: str
    threads: tuple[str, ...]
    held: int


def load_with_little_memory(checkpoint: Path, folder: Path, allowances: Sequence[int]) -> list[Outcome]:
    """Load `checkpoint` once for each of `allowances`, in bytes, in one process that has loaded it before.

    Allowances must be enough for threads to start: Python itself hangs where a thread's first allocation fails.

    Raises:
        RuntimeError: the process crashed or hung.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "outcomes.json"
    with series_process(_load, folder / "log.txt", checkpoint, tuple(allowances), results) as process:
        process.join(_SECONDS)
        ended = process.exitcode
    if ended != 0:
        raise RuntimeError(f"the process {'hung' if ended is None else f'ended with exit code {ended}'}: {folder}")
    return [Outcome(**fields) for fields in json.loads(results.read_text())]


def _load(checkpoint: Path, allowances: Sequence[int], results: Path) -> None:
    from workbench.loads.devices import release_host_memory
    from workbench.loads.job import changed_environ

    # Memory that a load gives back must not be there for the next one, outside the limit.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    series = LoadSeries(checkpoint)
    outcomes = []
    with changed_environ({MODE_VARIABLE: "1"}):
        series.load(checkpoint)
        for allowance in allowances:
            release_host_memory()
            outcomes.append(_load_within(series, checkpoint, allowance))
    results.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))


def _load_within(series: LoadSeries, checkpoint: Path, allowance: int) -> Outcome:
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    error: BaseException | None = None
    resource.setrlimit(resource.RLIMIT_DATA, (_data_bytes() + allowance, most))
    try:
        series.load(checkpoint)
    except Exception as raised:
        error = raised
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    cause = error.__cause__ if error is not None else None
    return Outcome(allowance, _text(error), _text(cause), streaming_threads(), staging_held())


def _data_bytes() -> int:
    """What ``RLIMIT_DATA`` limits: this process's heap and private anonymous memory."""
    (kilobytes,) = re.findall(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def _text(error: BaseException | None) -> str:
    return "" if error is None else "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
