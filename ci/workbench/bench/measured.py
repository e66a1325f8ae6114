"""Peaks of real loads on the CPU, to compare with plans.

Each measured load runs in a process that has made the same load before. The first one in a process also imports,
compiles and starts what every later one uses: near 100 MB that have nothing to do with the model. The remainder besides
the model is threads' scratch memory and Python objects, some MB: models are large enough that this is below 1 %.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sglang_overlay.observe.memory import DEFAULT_INTERVAL_MS
from sglang_overlay.observe.report import LoadReport, read_folder
from sglang_overlay.offline.plan.job import MODES, WHOLE_LAYERS, Job, Layout, Mode
from sglang_overlay.settings import REPORT_VARIABLE
from workbench.loads.checkpoints import CheckpointSpec, build
from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadWorkers

MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17), "MALLOC_TRIM_THRESHOLD_": str(1 << 17)}
"""glibc raises both when large blocks are freed, and then keeps up to 64 MB. Fixed values make it release all memory,
as plans assume."""


@dataclass(frozen=True)
class MeasuredModel:
    """A checkpoint that is actually loaded."""

    spec: CheckpointSpec
    tp: int = 1

    @property
    def name(self) -> str:
        """Name for files and tables."""
        return f"{self.spec.family}-{self.spec.size}-tp{self.tp}"

    @property
    def modes(self) -> tuple[Mode, ...]:
        """Modes whose peak is deterministic.

        DeepSeek's loader distributes experts over threads, so the number of whole layers in progress depends on timing.
        """
        return tuple(mode for mode in MODES if mode not in WHOLE_LAYERS or not self.spec.family.startswith("deepseek"))

    def planned(self, mode: Mode, folder: Path) -> Job:
        """The same load as a planning job; checkpoints are kept in ``folder``."""
        return Job(build(self.spec, folder), Layout(tp=self.tp), mode=mode, device="cpu")

    def loaded(self, mode: Mode, folder: Path) -> LoadJob:
        """The real load."""
        return LoadJob(
            build(self.spec, folder),
            streaming="0" if mode == "stock" else "require",
            staging=mode if mode == "layers" or mode == "complete_layers" else "units",
            peak_seconds=3 * DEFAULT_INTERVAL_MS / 1000,
            tp_size=self.tp,
        )


MODELS = (
    MeasuredModel(CheckpointSpec("qwen3", size="demo", files=3)),
    MeasuredModel(CheckpointSpec("qwen3_moe", size="bench_2g", files=4)),
    MeasuredModel(CheckpointSpec("qwen3_moe", size="bench_2g", files=4), tp=2),
    MeasuredModel(CheckpointSpec("deepseek_v3", size="bench_2g", files=4)),
    MeasuredModel(CheckpointSpec("deepseek_v3", size="bench_2g", files=4), tp=2),
)


def measure(model: MeasuredModel, folder: Path) -> Mapping[Mode, list[LoadReport]]:
    """Each rank's report of a load in each mode."""
    with tempfile.TemporaryDirectory() as scratch, _workers(Path(scratch) / "logs") as workers:
        return {mode: _lower(workers, model.loaded(mode, folder), Path(scratch) / mode) for mode in model.modes}


def _workers(logs: Path) -> LoadWorkers:
    # Spawned, since glibc reads its settings when a program starts.
    return LoadWorkers(logs, MALLOC, "spawn")


def _lower(workers: LoadWorkers, job: LoadJob, folder: Path) -> list[LoadReport]:
    """The second or the third load, whichever is lower: a busy machine can only raise a peak."""
    workers.load(job)
    loads = []
    for number in range(2):
        reports = folder / str(number)
        workers.load(replace(job, environ={REPORT_VARIABLE: str(reports)}))
        loads.append(list(read_folder(reports)))
    return min(loads, key=lambda ranks: max(rank.memory.peak_above_start for rank in ranks))


def measure_all(folder: Path) -> Iterator[tuple[MeasuredModel, dict[str, int]]]:
    """Highest peak of any rank in each mode, in bytes above the memory at the start."""
    for model in MODELS:
        reports = measure(model, folder)
        yield model, {mode: max(load.memory.peak_above_start for load in loads) for mode, loads in reports.items()}
