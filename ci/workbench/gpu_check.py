# SPDX-License-Identifier: Apache-2.0
"""Runs the steps of :mod:`workbench.gpu_steps` on a machine with an NVIDIA GPU, each in a process with a time limit.

With ``--wheels`` it makes the environment itself, out of those and what the machine has. Standard library only: nothing
is installed yet where this runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

# Run as a file, by the Python that has the machine's torch.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workbench import environment, pieces
from workbench.environment import CLONE, EnvironmentSetupError, interpreter, site_packages
from workbench.pieces import DamagedPiecesError

SECONDS = {
    "environment": 180,
    "identity": 420,
    "graphs": 300,
    "update": 420,
    "checkpoint": 300,
    "memory": 240,
    "time": 420,
    "ring": 560,
}
"""The steps in order, and how long each may take: one fits in a call of 10 minutes."""
_TAIL_LINES = 15
_DETAIL_WIDTH = 110


@dataclass(frozen=True)
class Step:
    """What became of a step: its findings as :mod:`workbench.gpu_steps` wrote them, a line of which may be its end."""

    name: str
    seconds: float
    findings: tuple[dict[str, Any], ...]

    def count(self, verdict: str) -> int:
        """Findings of that verdict."""
        return sum(finding["verdict"] == verdict for finding in self.findings)


@dataclass(frozen=True)
class Options:
    """The command's arguments: see ``--help``."""

    wheels: Path | None
    checkpoint_gb: float
    rounds: int
    steps: tuple[str, ...]
    work: Path
    device: str


def prepared(options: Options) -> Path:
    """The Python that the steps run in: of an environment made from the wheels, or of the whole lock's.

    Raises:
        DamagedPiecesError: the wheels are not what the manifest says.
        EnvironmentSetupError: it cannot be made.
    """
    if options.wheels is None:
        return environment.ensure(environment.planned())
    target = options.work / "environment"
    if not environment.is_complete(target):
        _install(options.wheels, options.work / "wheels", target)
    return interpreter(target)


def _install(wheels: Path, unpacked: Path, target: Path) -> None:
    files = sorted(wheels.glob("*.whl"))
    if not files:
        check_machine(pieces.read_manifest(wheels).facts)
        files = pieces.unpack(wheels, unpacked)
    if target.exists():
        shutil.rmtree(target)
    _run(sys.executable, "-m", "venv", "--without-pip", str(target))
    pip = [sys.executable, "-m", "pip", "--python", str(interpreter(target)), "install", "--quiet", "--no-index"]
    _run(*pip, "--no-deps", "--no-compile", *map(str, files))
    _run(*pip, "--no-deps", "--no-build-isolation", "--editable", str(CLONE))
    # Not --system-site-packages: where the machine has its torch in an environment, that shows the packages of the
    # Python below it. And not before: pip must not find the machine's packages, and take them for installed.
    links = "".join(f"import site; site.addsitedir({folder!r})\n" for folder in _packages_here())
    (site_packages(target) / "_machine.pth").write_text(links, encoding="utf-8")
    # Each step starts several processes, and each would compile 6,000 files.
    _run(str(interpreter(target)), "-m", "compileall", "-q", "-j", "0", str(site_packages(target)), allowed=(0, 1))
    environment.complete(target, wheels=len(files))
    shutil.rmtree(unpacked, ignore_errors=True)


def _packages_here() -> list[str]:
    """Folders of packages that this interpreter imports from."""
    return [path for path in sys.path if path.endswith(("site-packages", "dist-packages")) and Path(path).is_dir()]


def check_machine(facts: dict[str, Any]) -> None:
    """Refuse wheels for another Python, and say so where they are made for another torch."""
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


def _run(*command: str, allowed: Sequence[int] = (0,)) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(command, env=kept, check=False)
    if done.returncode not in allowed:
        raise EnvironmentSetupError(f"This step failed, see above: {' '.join(command[:8])} ...")


def run_step(name: str, python: Path, options: Options) -> Step:
    """Run a step in a process of its own; that it failed or took too long is a finding."""
    found, log = options.work / "results" / f"{name}.jsonl", options.work / "results" / f"{name}.log"
    found.parent.mkdir(parents=True, exist_ok=True)
    found.unlink(missing_ok=True)
    setting = {
        "--device": options.device,
        "--work": options.work,
        "--checkpoint-gb": options.checkpoint_gb,
        "--rounds": options.rounds,
        "--out": found,
    }
    arguments = [str(part) for pair in setting.items() for part in pair]
    begin = time.monotonic()
    ended = _watched([str(python), "-P", "-m", "workbench.gpu_steps", name, *arguments], log, SECONDS[name])
    findings = [json.loads(line) for line in found.read_text().splitlines()] if found.exists() else []
    if ended is not None:
        findings.append({"what": name, "verdict": "failed", "detail": f"{ended}\n{_tail(log)}", "figures": {}})
    return Step(name, round(time.monotonic() - begin, 1), tuple(findings))


def _watched(command: list[str], log: Path, seconds: float) -> str | None:
    """Run a command and everything that it starts, for so long at most; how it ended, if not well."""
    from workbench.serving import stop

    variables = {**os.environ, "PYTHONPATH": str(CLONE / "ci"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return f"not done after {seconds} s"
        finally:
            stop(process)
    return None if code == 0 else f"ended with exit code {code}"


def _tail(log: Path) -> str:
    return "\n".join(line[:300] for line in log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])


def write_results(options: Options, step: Step) -> None:
    """One file a step, so that calls with different steps add to each other."""
    path = options.work / "results" / f"{step.name}.json"
    path.write_text(json.dumps({"device": options.device, **asdict(step)}, indent=2) + "\n", encoding="utf-8")


def table(steps: Sequence[Step]) -> Iterator[str]:
    """A line for each finding, and one that counts them."""
    for step in steps:
        for number, finding in enumerate(step.findings):
            seconds = f"{step.seconds:.0f} s" if number == 0 else ""
            detail = finding["detail"] if finding["verdict"] == "failed" else finding["detail"][:_DETAIL_WIDTH]
            name = "" if number else step.name
            yield f"{name:12} {seconds:>6}  {finding['verdict'].upper():8} {finding['what']:34} {detail}"
    counts = {verdict: sum(step.count(verdict) for step in steps) for verdict in ("passed", "failed", "skipped")}
    yield ", ".join(f"{number} {verdict}" for verdict, number in counts.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Check on a GPU that streaming gives stock's model, within its memory and time."""
    parser = argparse.ArgumentParser(prog="ci/gpu_check", description=main.__doc__)
    parser.add_argument("--wheels", type=Path, help="what ci/gpu_wheels wrote, pieces or wheels; else the whole lock")
    parser.add_argument("--checkpoint-gb", type=float, help="of the large checkpoint; 16, or 0.01 in a rehearsal")
    parser.add_argument("--rounds", type=int, help="counted runs of each contender; 5, or 1 in a rehearsal")
    parser.add_argument("--steps", default=",".join(SECONDS), help="which, in this order: %(default)s")
    parser.add_argument("--work", type=Path, help="folder for environment, checkpoints and results, kept between calls")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU reference platform, with tiny checkpoints")
    given = parser.parse_args(arguments)
    steps = tuple(name for name in SECONDS if name in given.steps.split(","))
    if unknown := set(given.steps.split(",")) - SECONDS.keys():
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {', '.join(SECONDS)}")
    if not given.rehearse and not environment.has_nvidia_gpu():
        print(f"SKIPPED: there is no NVIDIA GPU here, and none of {len(steps)} steps was run ({', '.join(steps)})")
        return 0
    sizes = (0.01, 1) if given.rehearse else (16.0, 5)
    return _check(
        Options(
            wheels=given.wheels,
            checkpoint_gb=sizes[0] if given.checkpoint_gb is None else given.checkpoint_gb,
            rounds=int(sizes[1]) if given.rounds is None else given.rounds,
            steps=steps,
            work=(given.work or environment.cache_root() / "gpu-check").resolve(),
            device="cpu" if given.rehearse else "cuda",
        )
    )


def _check(options: Options) -> int:
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        python = prepared(options)
    except (DamagedPiecesError, EnvironmentSetupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    steps = []
    for name in options.steps:
        print(f"{name} ...", flush=True)
        steps.append(run_step(name, python, options))
        write_results(options, steps[-1])
    print("\n".join(table(steps)))
    print(f"results: {options.work / 'results'}")
    return int(any(step.count("failed") for step in steps))


if __name__ == "__main__":
    sys.exit(main())
