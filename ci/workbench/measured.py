"""Peaks of real loads on the CPU, to hold plans against: in a process that has loaded a model before.

The first load in a process also imports, compiles and starts what every later one uses: near 100 MB that have nothing
to do with the model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sglang_overlay.observe.report import LoadReport, read_folder
from sglang_overlay.plan.job import Job, Layout
from workbench.checkpoints import CheckpointSpec, build
from workbench.loads import LoadJob, LoadWorkers

MeasuredMode = Literal["stock", "streaming"]
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}
"""glibc raises both as large memory is freed, and then keeps up to 64 MB: here it gives all back, as a plan assumes."""

STREAMING: dict[MeasuredMode, str] = {"stock": "0", "streaming": "require"}


@dataclass(frozen=True)
class MeasuredModel:
    """A checkpoint that is loaded for real, large enough that what a process needs anyway does not count."""

    spec: CheckpointSpec
    tp: int = 1

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"{self.spec.family}-{self.spec.size}-tp{self.tp}"

    def job(self, mode: MeasuredMode, folder: Path) -> Job:
        """The same load, to be planned."""
        return Job(build(self.spec, folder), Layout(tp=self.tp), mode=mode, device="cpu")


MODELS = (
    MeasuredModel(CheckpointSpec("qwen3_moe", size="bench_2g", files=4)),
    MeasuredModel(CheckpointSpec("deepseek_v3", size="bench_2g", files=4)),
)


def measure(model: MeasuredModel, mode: MeasuredMode, folder: Path) -> LoadReport:
    """The report of rank 0 of a real load; checkpoints are kept in ``folder``."""
    with tempfile.TemporaryDirectory() as scratch, _workers(Path(scratch) / "logs") as workers:
        reports = Path(scratch) / "reports"
        job = LoadJob(build(model.spec, folder), streaming=STREAMING[mode], tp_size=model.tp)
        workers.load(job)
        workers.load(replace(job, environ={"SGLANG_STREAMFP8_REPORT": str(reports)}))
        return read_folder(reports)[0]


def _workers(folder: Path) -> LoadWorkers:
    # Spawned: glibc reads its settings when a program starts.
    return LoadWorkers(folder, _MALLOC, "spawn")


def measure_all(models: tuple[MeasuredModel, ...], folder: Path) -> Iterator[tuple[MeasuredModel, MeasuredMode, int]]:
    """Peak of each model in each mode, in bytes above the memory at the start."""
    for model in models:
        for mode in STREAMING:
            yield model, mode, measure(model, mode, folder).memory.peak_above_start
