# SPDX-License-Identifier: Apache-2.0
"""Time and memory of full weight updates: of streamed fp8 beside stock's bf16, and beside a fresh streaming load.

Stock SGLang cannot update what it quantized online, so its bf16 server is what an update can be compared with. Both get
the same tensors in the same calls through SGLang's own ``WeightUpdater``, in alternating jobs. A job loads the model
and updates it twice; the second time counts, since the first one also pays for code that runs for the first time.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_overlay.observe.formats import bytes_text
from workbench.bench import page_tables
from workbench.bench.bench import BF16, STREAMING, Case, CaseResult, Run, figures, job_of, ratio, weight_bytes
from workbench.loads.checkpoints import build, tensor_plans
from workbench.loads.loads import LoadResult, LoadWorkers
from workbench.loads.updates import Update

BUCKET = 256_000_000
"""Bytes of tensors a call, about; trainers send 0.5 to 2 GB a call of models that are many times these."""
SOURCES = {"disk": "from disk", "tensor": "by tensors", "bucket": "by buckets"}
"""Ways of sending, by the name that ``Update`` has for each."""
FRESH = "fresh load"
"""The load of streamed fp8 in the same round."""
BEFORE, AFTER = "bf16", "fp8"
_KEPT = re.compile(r"([\d.]+) MB of replaced values kept")
CONTENDERS = ((BEFORE, BF16), (AFTER, STREAMING))


@dataclass(frozen=True)
class UpdateRun(Run):
    """One update, or the fresh load. ``peak`` is above the memory before; ``final`` is the model's.

    Attributes:
        bucket: bytes of the largest call's tensors; 0 from disk.
        undo: bytes of replaced values that are kept until the update ends.
        left: bytes at the end above those before.
    """

    bucket: int = 0
    undo: int = 0
    left: int = 0


def name_of(model: str, source: str) -> str:
    """The contender's name in tables and data."""
    return f"{model} {SOURCES[source]}"


def measure_updates(
    workers: LoadWorkers,
    case: Case,
    folder: Path,
    rounds: int,
    done: Callable[[Run], None] = lambda _: None,
    bucket: int = BUCKET,
) -> CaseResult:
    """Update each model in each way ``rounds`` times, all in turn, after a round that is not counted.

    ``folder`` is where the checkpoint is, or will be written.
    """
    checkpoint, size = build(case.spec, folder), weight_bytes(case.spec)
    runs = []
    for number in range(1 + rounds):
        for source in SOURCES:
            calls = 1 if source == "disk" else -(-size // bucket)
            update = Update(source, checkpoint, calls=calls)  # type: ignore[arg-type]
            for model, contender in CONTENDERS:
                for run in _runs(model, source, workers.load(job_of(case, contender, checkpoint, (update, update)))):
                    runs += [run] if number else []
                    done(run)
    return CaseResult(case, size, len(tensor_plans(case.spec)), tuple(runs))


def _runs(model: str, source: str, result: LoadResult) -> Iterator[UpdateRun]:
    if (model, source) == (AFTER, "disk"):
        yield UpdateRun(
            FRESH,
            max(rank.load_seconds for rank in result.ranks),
            sum(rank.load_cpu_seconds for rank in result.ranks),
            sum(rank.memory.peak_above_start for rank in result.ranks),
            sum(rank.model_bytes for rank in result.ranks),
        )
    updates: list[Any] = [rank.updates[-1] for rank in result.ranks]
    for update in updates:
        if not update.success:
            raise RuntimeError(f"an update {SOURCES[source]} of {model} failed: {update.message}")
    yield UpdateRun(
        name_of(model, source),
        max(update.seconds for update in updates),
        sum(update.cpu_seconds for update in updates),
        sum(update.memory.peak_above_start for update in updates),
        sum(rank.model_bytes for rank in result.ranks),
        bucket=sum(update.bucket for update in updates),
        undo=sum(_kept(rank.log) for rank in result.ranks),
        left=sum(update.memory.end_above_start for update in updates),
    )


def _kept(log: Sequence[str]) -> int:
    """Bytes that a rank's last update kept for undoing; 0 of stock's, which keeps none."""
    found = [match for line in log if (match := _KEPT.search(line))]
    return round(float(found[-1][1]) * 1e6) if found else 0


def with_table(page: str, published: dict[str, Any]) -> str:
    """A page, such as docs/updates.md, with a table of a document's medians, and of the medians of its ratios."""
    return page_tables.with_table(page, "ci/bench --updates", COLUMNS, table_rows(published))


def table_rows(published: dict[str, Any]) -> list[list[str]]:
    """The rows of a document's cases."""
    return [row for case in published["cases"] for row in rows_of(case["name"], runs_of(case))]


def runs_of(case: dict[str, Any]) -> list[UpdateRun]:
    """The runs of a case of a document."""
    return [UpdateRun(**run) for run in case["runs"]]


COLUMNS = (
    "checkpoint",
    "update",
    "seconds:",
    "/ bf16's:",
    "/ fresh load:",
    "memory above steady:",
    "to undo:",
    "a bucket:",
    "the rest:",
)


def rows_of(case: str, runs: Sequence[UpdateRun]) -> Iterator[list[str]]:
    """A row of text for each contender."""
    for number, (name, found) in enumerate(figures(runs).items()):
        mine = [run for run in runs if run.contender == name]
        undo, bucket = mine[0].undo, mine[0].bucket if name.endswith(SOURCES["bucket"]) else 0
        rest = statistics.median(run.peak - undo - bucket for run in mine)
        is_update = name != FRESH
        yield [
            "" if number else case,
            name,
            f"{found.seconds:.2f}",
            f"{ratio(runs, name, name.replace(AFTER, BEFORE), 'seconds'):.2f}" if name.startswith(AFTER) else "",
            f"{ratio(runs, name, FRESH, 'seconds'):.2f}" if name.startswith(AFTER) else "",
            bytes_text(found.peak),
            bytes_text(undo) if is_update and undo else "",
            bytes_text(bucket) if bucket else "",
            bytes_text(max(rest, 0)) if is_update else "",
        ]
