# SPDX-License-Identifier: Apache-2.0
"""Results of ``ci/bench`` as JSON data: every run, with machine, versions and commit.

``docs/bench.json`` is such a document, and the table of docs/figures.md is made from it.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sglang_overlay.observe.formats import bytes_text
from workbench.bench import page_tables
from workbench.bench.bench import BF16, STOCK, CaseResult, Run, figures, ratio

_PACKAGES = ("sglang", "sglang-streamfp8", "torch", "transformers", "safetensors", "llvmlite")


def document(results: Sequence[CaseResult]) -> dict[str, Any]:
    """The document. It contains no host, user or path names."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": machine(),
        "cases": [_case(result) for result in results],
    }


def with_table(page: str, published: dict[str, Any]) -> str:
    """The page with its table replaced: a document's medians, and the medians of the rounds' ratios."""
    rows = [row for case in published["cases"] for row in _rows(case["name"], [Run(**run) for run in case["runs"]])]
    return page_tables.with_table(page, "ci/bench", _COLUMNS, rows)


_COLUMNS = (
    "checkpoint",
    "loading",
    "seconds:",
    "peak:",
    "peak / loaded model:",
    "peak / stock:",
    "time / stock:",
    "time / bf16:",
)


def _rows(case: str, runs: Sequence[Run]) -> Iterator[list[str]]:
    for number, (name, found) in enumerate(figures(runs).items()):
        ratios = [(STOCK, "peak"), (STOCK, "seconds"), (BF16, "seconds")]
        yield [
            "" if number else case,
            name,
            f"{found.seconds:.2f}",
            bytes_text(found.peak),
            f"{found.peak_of_final:.3f}",
            *(f"{ratio(runs, name, other.name, measured):.2f}" for other, measured in ratios),
        ]


def machine() -> dict[str, Any]:
    """Processor, number of usable cores, memory in bytes, system."""
    return {
        "processor": _first(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": int(_first(Path("/proc/meminfo"), r"MemTotal:\s*(\d+) kB") or 0) * 1024,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _case(result: CaseResult) -> dict[str, Any]:
    case, spec = result.case, result.case.spec
    return {
        "name": case.name,
        "family": spec.family,
        "size": spec.size,
        "overrides": dict(spec.overrides),
        "files": spec.files,
        "order": case.order,
        "tp_size": case.tp_size,
        "threads": case.threads,
        "checkpoint_bytes": result.checkpoint_bytes,
        "checkpoint_tensors": result.checkpoint_tensors,
        "runs": [asdict(run) for run in result.runs],
    }


def _first(file: Path, pattern: str) -> str:
    found = re.search(pattern, file.read_text()) if file.exists() else None
    return found.group(1).strip() if found else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _commit() -> str:
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or "unknown"
