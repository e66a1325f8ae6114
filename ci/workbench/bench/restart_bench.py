# SPDX-License-Identifier: Apache-2.0
"""``ci/bench --restart``: what a start costs that reads fp8 weights which an earlier one has written.

Four starts in turn: bf16, streaming, streaming and writing a dump (``--load-format presharded``), reading that dump.
Files are in the page cache when seconds are measured. Bytes read are those of one more round: files leave the page
cache before each start, and what is there after it has been read.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang_overlay.observe.formats import bytes_text
from workbench.bench import bench_document, page_tables
from workbench.bench.bench import BF16, STREAMING, Case, CaseResult, Contender, Run, figures, job_of, measure, ratio
from workbench.loads.checkpoints import checkpoint_path
from workbench.loads.loads import LoadWorkers

FIRST, SECOND = "first start", "second start"


@dataclass(frozen=True)
class RestartResult(CaseResult):
    """Also the bytes that each contender reads of the checkpoint and of the dump, by its name."""

    bytes_read: dict[str, int]


def measure_restarts(
    workers: LoadWorkers, case: Case, folder: Path, rounds: int, done: Callable[[Run], None] = lambda _: None
) -> RestartResult:
    """As ``bench.measure``, with a dump that is written anew in each round."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        dump = Path(scratch, "dump")
        contenders = (BF16, STREAMING, *(replace(STREAMING, name=name, presharded=dump) for name in (FIRST, SECOND)))

        def finish(run: Run) -> None:
            done(run)
            if run.contender == SECOND:
                shutil.rmtree(dump)

        result = measure(workers, case, folder, rounds, contenders, done=finish)
        read = {contender.name: _bytes_read(workers, case, folder, contender) for contender in contenders}
    return RestartResult(**vars(result), bytes_read=read)


def _bytes_read(workers: LoadWorkers, case: Case, folder: Path, contender: Contender) -> int:
    checkpoint = checkpoint_path(case.spec, folder)
    dumped = sorted(contender.presharded.rglob("*.safetensor")) if contender.presharded else []
    files = [*checkpoint.glob("*.safetensors"), *dumped]
    for file in files:
        evict(file)
    workers.load(job_of(case, contender, checkpoint))
    return sum(map(cached_bytes, files))


def evict(file: Path) -> None:
    """Remove a file from the page cache; no process may have it mapped."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_bytes(file: Path) -> int:
    """How much of a file is in the page cache (``mincore``)."""
    pages = -(-file.stat().st_size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    # A private mapping, which ctypes can take the address of.
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        begin = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(begin)), ctypes.c_size_t(len(mapped)), found
        )
        del begin
    if failed:
        raise OSError(ctypes.get_errno(), f"mincore of {file}")
    return sum(page & 1 for page in found) * mmap.PAGESIZE


COLUMNS = ("checkpoint", "start", "seconds:", "time / streaming:", "peak:", "peak / loaded model:", "bytes read:")


def document(results: Sequence[CaseResult]) -> dict[str, Any]:
    """As ``bench_document.document``, with the bytes read."""
    about = bench_document.document(results)
    for case, result in zip(about["cases"], results, strict=True):
        assert isinstance(result, RestartResult)
        case["bytes_read"] = result.bytes_read
    return about


def rows_of(published: dict[str, Any]) -> Iterator[list[str]]:
    """The table's rows of a document."""
    for case in published["cases"]:
        runs = [Run(**run) for run in case["runs"]]
        for number, (contender, found) in enumerate(figures(runs).items()):
            yield [
                "" if number else case["name"],
                contender,
                f"{found.seconds:.2f}",
                f"{ratio(runs, contender, STREAMING.name, 'seconds'):.2f}",
                bytes_text(found.peak),
                f"{found.peak_of_final:.3f}",
                bytes_text(case["bytes_read"][contender]),
            ]


def with_table(page: str, published: dict[str, Any]) -> str:
    """The page with its table replaced."""
    return page_tables.with_table(page, "ci/bench --restart", COLUMNS, rows_of(published))
