"""What SGLang's plugin entry point costs a process that loads no model.

Each run is a new interpreter, in which the standard library's modules that SGLang imports anyway are there already.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass

PROGRAM = """
import collections.abc, functools, logging, os, sys, time, typing
before = time.perf_counter()
from sglang_overlay.hooks.plugin import activate
import sglang_overlay.cpu_reference.plugin
imported = time.perf_counter()
activate()
print(1000 * (imported - before), 1000 * (time.perf_counter() - imported))
"""


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one process: importing the entry points' modules, and calling ``activate``."""

    importing: float
    activating: float

    @property
    def total(self) -> float:
        return self.importing + self.activating


def measure(runs: int) -> list[Cost]:
    """The cost in as many processes, one after the other; one before them compiles the modules, as installing does."""
    with tempfile.TemporaryDirectory() as bytecode:
        return [_measure_one(bytecode) for _ in range(runs + 1)][1:]


def _measure_one(bytecode: str) -> Cost:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_STREAMFP8")}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)
    environ["PYTHONPYCACHEPREFIX"] = bytecode
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environ, capture_output=True, text=True, check=True)
    return Cost(*map(float, done.stdout.split()))


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="ci/entry_point_cost", description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    costs = measure(parser.parse_args(arguments).runs)
    for what, values in (
        ("import", [cost.importing for cost in costs]),
        ("activate", [cost.activating for cost in costs]),
        ("together", [cost.total for cost in costs]),
    ):
        print(f"{what:9} median {statistics.median(values):.3f} ms, lowest {min(values):.3f} ms")


if __name__ == "__main__":
    main()
