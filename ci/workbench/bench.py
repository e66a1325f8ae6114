# SPDX-License-Identifier: Apache-2.0
"""Peak memory and load time of stock bf16, stock fp8 and streaming, over one checkpoint in alternating runs.

Every run is ``ModelRunner.load_model`` in real SGLang, in a process that has loaded a model before, so that imports and
first-use costs are in none of them. Times on a shared machine drift: quote the ratios, which compare neighbours.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_overlay import __version__
from sglang_overlay.upstream import releases
from workbench.loads import LoadJob, LoadResult, LoadWorkers


@dataclass(frozen=True)
class Contender:
    """One way to load a checkpoint."""

    name: str
    quantization: str | None
    streaming: str


CONTENDERS = (
    Contender("stock bf16", None, "0"),
    Contender("stock fp8", "fp8", "0"),
    Contender("streaming fp8", "fp8", "require"),
)


@dataclass(frozen=True)
class Run:
    """One load: seconds, and bytes above start (``peak``) and of the loaded model (``final``), summed over ranks."""

    contender: str
    seconds: float
    peak: int
    final: int


def alternate(
    workers: LoadWorkers,
    checkpoint: Path,
    rounds: int,
    tp_size: int = 1,
    done: Callable[[Run], None] = lambda _: None,
) -> list[Run]:
    """A warm-up of each contender that is not counted, then ``rounds`` times each in turn."""
    runs = []
    for number in range(rounds + 1):
        for contender in CONTENDERS:
            job = LoadJob(
                checkpoint, streaming=contender.streaming, quantization=contender.quantization, tp_size=tp_size
            )
            run = _run(contender, workers.load(job))
            if number:
                runs.append(run)
            done(run)
    return runs


def _run(contender: Contender, result: LoadResult) -> Run:
    return Run(
        contender=contender.name,
        seconds=max(rank.load_seconds for rank in result.ranks),
        peak=sum(rank.memory.peak_above_start for rank in result.ranks),
        final=sum(rank.model_bytes for rank in result.ranks),
    )


@dataclass(frozen=True)
class Figures:
    """Medians of one contender."""

    contender: str
    seconds: float
    peak: float
    final: float
    seconds_range: tuple[float, float]

    @property
    def peak_of_final(self) -> float:
        """Peak above start over the loaded model's bytes."""
        return self.peak / self.final


def figures(runs: Sequence[Run]) -> dict[str, Figures]:
    """Medians by contender."""
    grouped = {contender.name: [run for run in runs if run.contender == contender.name] for contender in CONTENDERS}
    return {name: _figures(name, mine) for name, mine in grouped.items() if mine}


def _figures(name: str, runs: Sequence[Run]) -> Figures:
    seconds = [run.seconds for run in runs]
    return Figures(
        contender=name,
        seconds=statistics.median(seconds),
        peak=statistics.median(run.peak for run in runs),
        final=statistics.median(run.final for run in runs),
        seconds_range=(min(seconds), max(seconds)),
    )


def ratio(runs: Sequence[Run], one: str, other: str, measure: str) -> float:
    """Median over the rounds of ``one / other``, each round's runs compared with each other."""
    pairs = zip(
        [getattr(run, measure) for run in runs if run.contender == one],
        [getattr(run, measure) for run in runs if run.contender == other],
        strict=True,
    )
    return float(statistics.median(a / b for a, b in pairs))


def document(runs: Sequence[Run], checkpoint: Path, tp_size: int) -> dict[str, Any]:
    """Everything about a benchmark as JSON data."""
    return {
        "checkpoint": checkpoint.name,
        "tp_size": tp_size,
        "sglang": releases.installed(),
        "overlay": __version__,
        "commit": _commit(),
        "machine": {"processor": platform.machine(), "system": platform.system(), "python": platform.python_version()},
        "runs": [asdict(run) for run in runs],
    }


def _commit() -> str:
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or "unknown"
