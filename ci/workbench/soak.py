# SPDX-License-Identifier: Apache-2.0
"""Load a model again and again in one process and watch its memory."""

from __future__ import annotations

import json
from pathlib import Path

from workbench.load_series import LoadSeries, series_process, streaming_threads


def soak(checkpoint: Path, folder: Path, loads: int) -> list[int]:
    """Anonymous memory in bytes after each of `loads` streaming loads, the model let go each time."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "memory.json"
    with series_process(_load_again_and_again, folder / "log.txt", checkpoint, loads, results) as process:
        process.join()
    if process.exitcode:
        raise RuntimeError(f"the loads ended with exit code {process.exitcode}: {folder / 'log.txt'}")
    found: list[int] = json.loads(results.read_text())
    return found


def _load_again_and_again(checkpoint: Path, loads: int, results: Path) -> None:
    from sglang_overlay.observe.memory import meter_for
    from workbench.load_worker import give_back_memory
    from workbench.loads import changed_environ

    series = LoadSeries(checkpoint)
    meter = meter_for("cpu")
    found = []
    with changed_environ({"SGLANG_STREAMFP8": "require"}):
        for _ in range(loads):
            series.load(checkpoint)
            give_back_memory()
            found.append(meter.read())
    if streaming_threads():
        raise RuntimeError(f"threads left: {streaming_threads()}")
    results.write_text(json.dumps(found))
