# SPDX-License-Identifier: Apache-2.0
"""Run ``gpu_steps.py`` on a machine with an NVIDIA GPU: all steps in one process, which imports SGLang once.

If that process dies, its current step has failed, and another process continues with the next one. With ``--wheels``,
SGLang is taken from those and everything else from the machine. Standard library only: nothing is installed there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Run as a file, by the Python that has the machine's torch.
if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[above]) for above in (2, 3)]

from workbench.gpu import gpu_modules, pieces
from workbench.gpu.pieces import DamagedPiecesError
from workbench.releases import environment
from workbench.releases.environment import CLONE, EnvironmentSetupError

STEPS = ("environment", "kernels", "identity", "graphs", "memory", "time", "update", "ring")
"""Steps in order: first what later steps build on, then what matters most."""
FINDINGS = "findings.jsonl"
LOG = "log"
_GRACE_SECONDS = 20
"""A load that began in time may end this much later."""
_TAIL_LINES = 25


@dataclass(frozen=True)
class Options:
    """The command's arguments: see ``--help``."""

    wheels: Path | None
    checkpoint_gb: float
    rounds: int
    steps: tuple[str, ...]
    seconds: float
    work: Path
    results: Path
    device: str

    @property
    def findings(self) -> Path:
        """The file with a line of JSON for each finding and for each step begun."""
        return self.results / FINDINGS

    @property
    def log(self) -> Path:
        """The file for SGLang's output."""
        return self.results / LOG


@dataclass(frozen=True)
class Interpreter:
    """The Python that runs the steps, and environment variables with which it finds SGLang."""

    python: Path
    variables: Mapping[str, str]


def prepared(options: Options) -> Interpreter:
    """SGLang from the wheels beside this Python's packages, or an environment with the whole lock.

    Raises:
        DamagedPiecesError: the wheels do not match the manifest.
        EnvironmentSetupError: the environment cannot be made.
    """
    if options.wheels is None:
        python = environment.ensure(environment.planned())
        return Interpreter(python, {"PYTHONPATH": os.pathsep.join([str(CLONE / "ci"), str(CLONE / "tests")])})
    folder = options.work / "unpacked"
    if not (folder / environment.MARKER).exists():
        check_machine(pieces.read_manifest(options.wheels).facts)
        shutil.rmtree(folder, ignore_errors=True)
        pieces.unpack(options.wheels, folder)
        # SGLang finds this package, which is imported from the clone, by these entry points.
        _run(sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder / "site"))
        environment.complete(folder)
    # Before the machine's packages, since some of those are too new.
    places = [folder / "site", CLONE / "ci", CLONE / "tests", CLONE]
    return Interpreter(
        Path(sys.executable),
        {
            "PYTHONPATH": os.pathsep.join(map(str, places)),
            gpu_modules.CACHE_VARIABLE: str(folder / "jit"),
            gpu_modules.SOURCES_VARIABLE: str(folder / gpu_modules.ROW_KERNELS),
        },
    )


def check_machine(facts: dict[str, Any]) -> None:
    """Refuse wheels for another Python, and warn about wheels for another torch."""
    here = environment.python_tag()
    if sys.version_info < environment.PYTHON_NEEDED:
        raise EnvironmentSetupError(f"The locks are for Python 3.11 and later, and this is {here}.")
    if facts["python"] != here:
        raise EnvironmentSetupError(
            f"The wheels are for Python {facts['python']}, and this is {here}: ci/gpu_wheels --python {here}"
        )
    try:
        torch = metadata.version("torch").partition("+")[0]
    except metadata.PackageNotFoundError:
        raise EnvironmentSetupError(f"{sys.executable} has no torch; run this with the Python that has it.") from None
    if torch != facts["torch"]:
        print(
            f"note: SGLang {facts['release']} and its kernels are made for torch {facts['torch']}, this is {torch}. "
            f"If they cannot be loaded: ci/gpu_wheels --torch {torch}",
            flush=True,
        )


def _run(*command: str) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    if subprocess.run(command, env=kept, cwd=CLONE, check=False).returncode:
        raise EnvironmentSetupError(f"This step failed, see above: {' '.join(command)}")


def run_steps(interpreter: Interpreter, options: Options) -> list[dict[str, Any]]:
    """Run the steps until all are done or the time is up; returns the findings in order."""
    options.findings.parent.mkdir(parents=True, exist_ok=True)
    options.findings.unlink(missing_ok=True)
    options.log.unlink(missing_ok=True)
    deadline = time.monotonic() + options.seconds
    left = options.steps
    while left:
        ended = _watched(interpreter, options, left, deadline)
        begun = [one["step"] for one in _lines(options.findings) if one["verdict"] == "begun"]
        if ended is None:
            break
        failed = begun[-1] if begun and begun[-1] in left else left[0]
        _write(options, failed, "failed", f"{ended}\n{_tail(options.log)}")
        left = left[left.index(failed) + 1 :]
        if time.monotonic() >= deadline:
            for name in left:
                _write(options, name, "skipped", "the time was up")
            break
    return [one for one in _lines(options.findings) if one["verdict"] != "begun"]


def _watched(interpreter: Interpreter, options: Options, steps: Sequence[str], deadline: float) -> str | None:
    """Run steps in one process, then end it and all that it started; returns how it failed, if it did."""
    left = max(0.0, deadline - time.monotonic())
    setting = {
        "--device": options.device,
        "--work": options.work,
        "--checkpoint-gb": options.checkpoint_gb,
        "--rounds": options.rounds,
        "--seconds": left,
        "--out": options.findings,
        "--log": options.log,
    }
    arguments = [str(part) for pair in setting.items() for part in pair]
    process = subprocess.Popen(
        [str(interpreter.python), "-P", "-m", "workbench.gpu.gpu_steps", *steps, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", **interpreter.variables},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(left + _GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"not done {_GRACE_SECONDS} s after the time was up"
    finally:
        # Its whole process group; the group's number is not reused while a member lives.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None if code == 0 else f"its process ended with exit code {code}"


def _write(options: Options, step: str, verdict: str, detail: str) -> None:
    finding = {"step": step, "what": step, "verdict": verdict, "detail": detail, "figures": {}}
    with options.findings.open("a", encoding="utf-8") as out:
        print(json.dumps(finding), file=out)
    print(f"{verdict.upper():8} {step:12} {detail}", flush=True)


def _lines(findings: Path) -> Iterator[dict[str, Any]]:
    if findings.exists():
        yield from (json.loads(line) for line in findings.read_text(encoding="utf-8").splitlines())


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_TAIL_LINES:] if log.exists() else []
    return "\n".join(line[:300] for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check on a GPU that streaming gives stock's model, within its memory and time."""
    parser = argparse.ArgumentParser(prog="ci/gpu_check", description=main.__doc__)
    parser.add_argument("--wheels", type=Path, help="the pieces that ci/gpu_wheels wrote; else the whole lock")
    parser.add_argument("--checkpoint-gb", type=float, help="of the large checkpoint; 8, or 0.01 in a rehearsal")
    parser.add_argument("--rounds", type=int, help="counted runs of each contender; 2, or 1 in a rehearsal")
    parser.add_argument("--steps", default=",".join(STEPS), help="which, in this order: %(default)s")
    parser.add_argument("--seconds", type=float, default=480, help="for all steps; what is left then is skipped")
    parser.add_argument("--work", type=Path, help="folder for SGLang, checkpoints and results, kept between calls")
    parser.add_argument("--results", type=Path, help="folder for findings and SGLang's log; results/ below --work")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU reference platform, with tiny checkpoints")
    given = parser.parse_args(arguments)
    steps = tuple(name for name in STEPS if name in given.steps.split(","))
    if unknown := set(given.steps.split(",")) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    if not given.rehearse and not environment.has_nvidia_gpu():
        print(f"SKIPPED: there is no NVIDIA GPU here, and none of {len(steps)} steps was run ({', '.join(steps)})")
        return 0
    work = (given.work or environment.cache_root() / "gpu-check").resolve()
    sizes = (0.01, 1) if given.rehearse else (8.0, 2)
    return _check(
        Options(
            wheels=given.wheels,
            checkpoint_gb=sizes[0] if given.checkpoint_gb is None else given.checkpoint_gb,
            rounds=int(sizes[1]) if given.rounds is None else given.rounds,
            steps=steps,
            seconds=given.seconds,
            work=work,
            results=(given.results or work / "results").resolve(),
            device="cpu" if given.rehearse else "cuda",
        )
    )


def _check(options: Options) -> int:
    options.work.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    try:
        interpreter = prepared(options)
    except (DamagedPiecesError, EnvironmentSetupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"prepared in {time.monotonic() - begin:.0f} s", flush=True)
    found = [one["verdict"] for one in run_steps(interpreter, options)]
    counts = ", ".join(f"{found.count(verdict)} {verdict}" for verdict in ("passed", "failed", "skipped"))
    print(f"{counts}, in {time.monotonic() - begin:.0f} s; {options.findings}")
    return int("failed" in found or not found)


if __name__ == "__main__":
    sys.exit(main())
