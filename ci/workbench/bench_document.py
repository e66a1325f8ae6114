# SPDX-License-Identifier: Apache-2.0
"""What ``ci/bench`` measured, as JSON data: every run, on which machine, with which versions, of which commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from workbench.bench import CaseResult

_PACKAGES = ("sglang", "sglang-streamfp8", "torch", "transformers", "safetensors", "llvmlite")


def document(results: Sequence[CaseResult]) -> dict[str, Any]:
    """Nothing in it names a host, a user or a path."""
    return {
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "machine": machine(),
        "cases": [_case(result) for result in results],
    }


def machine() -> dict[str, Any]:
    """Processor, number of cores that may be used, memory in bytes, system."""
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
