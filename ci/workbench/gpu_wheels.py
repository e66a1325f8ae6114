# SPDX-License-Identifier: Apache-2.0
"""The wheels that SGLang needs on a machine that has a GPU, CUDA and PyTorch but no package index.

Everything in a release's lock but what ``ci/locks/gpu_machine.txt`` names. Of sglang-kernel, whose wheel is 370 MB, the
Python files and the kernels for one generation of GPUs; of flashinfer-python the Python files.

Standard library only: nothing is installed where this runs.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Run as a file, by whichever Python there is.
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from workbench import environment, pieces
from workbench.environment import CLONE, EnvironmentSetupError, Plan, normalized
from workbench.pieces import Manifest
from workbench.wheel_files import trimmed

LEFT_OUT = Path("ci", "locks", "gpu_machine.txt")
"""Names of packages that are not collected, in a clone."""
ARCHITECTURE = "sm90"
"""GPUs whose kernels are collected: Hopper. sglang-kernel has a folder for each."""
_MEGABYTE = 10**6
_ROW = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[^ ;\\]+)", re.MULTILINE)


@dataclass(frozen=True)
class Wanted:
    """What to collect: for which release of SGLang, for which Python, such as ``3.12``, and ``without`` which packages
    beside those that are never collected.
    """

    plan: Plan
    python: str
    without: tuple[str, ...] = ()

    @property
    def requirements(self) -> str:
        """Their rows of the lock, hashes included."""
        return environment.without(self.plan.lock.read_text(encoding="utf-8"), self.left_out)

    @property
    def left_out(self) -> frozenset[str]:
        """Names in the lock that are not collected."""
        patterns = {*environment.names_in(self.plan.clone / LEFT_OUT), *map(normalized, self.without)}
        return frozenset(name for name in self.versions if any(fnmatch.fnmatch(name, one) for one in patterns))

    @property
    def versions(self) -> dict[str, str]:
        """Version of every package in the lock."""
        rows = _ROW.finditer(self.plan.lock.read_text(encoding="utf-8"))
        return {normalized(row["name"]): row["version"] for row in rows}


def collect(wanted: Wanted, out: Path, piece_bytes: int) -> Manifest:
    """Download, trim and pack; ``out`` must not exist.

    Raises:
        EnvironmentSetupError: the download failed.
    """
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix=".wheels-", dir=out) as scratch:
        folder = Path(scratch)
        _download(wanted, folder)
        for wheel in sorted(folder.glob("*.whl")):
            keep = TRIMMED.get(normalized(wheel.name.partition("-")[0]))
            if keep is not None:
                trimmed(wheel, keep, f"1{ARCHITECTURE}")
        facts = {
            "release": wanted.plan.release,
            "python": wanted.python,
            "torch": wanted.versions["torch"],
            "architecture": ARCHITECTURE,
            "left_out": sorted(wanted.left_out),
        }
        return pieces.pack(sorted(folder.glob("*.whl")), out, piece_bytes, **facts)


def _is_python(name: str) -> bool:
    # Under data/ FlashInfer has CUTLASS, with its examples.
    return name.endswith(".py") and "/data/" not in name


def _is_wanted_kernel(name: str) -> bool:
    return _is_python(name) or f"/{ARCHITECTURE}/" in name


# FlashInfer is to be imported and not to be used: SGLANG_IS_FLASHINFER_AVAILABLE=false in workbench.devices.
TRIMMED = {"sglang-kernel": _is_wanted_kernel, "flashinfer-python": _is_python}
"""Packages of which only part is collected, and which files that is."""


def _download(wanted: Wanted, folder: Path) -> None:
    pip = environment.ensure_uv(wanted.plan).with_name("python")
    listing = folder / "requirements.txt"
    listing.write_text(wanted.requirements, encoding="utf-8")
    wheels = [
        *("--no-deps", "--require-hashes", "--only-binary", ":all:"),
        *("--python-version", wanted.python, "--implementation", "cp"),
        *(part for platform in _platforms() for part in ("--platform", platform)),
    ]
    command = [str(pip), "-m", "pip", "download", "-qq", "--disable-pip-version-check", *wheels]
    environment.step(wanted.plan, [*command, "--dest", str(folder), "-r", str(listing)])


def _platforms() -> list[str]:
    """pip takes a wheel whose tag is one of these, and knows no "or older"."""
    numbered = [f"manylinux_2_{number}_x86_64" for number in range(34, 4, -1)]
    return [*numbered, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def release_for(torch: str, clone: Path = CLONE) -> str:
    """The newest supported release that is made for this version of torch.

    Raises:
        EnvironmentSetupError: there is none.
    """
    entries = json.loads((clone / environment.RELEASES).read_text(encoding="utf-8"))["supported"]
    found = [str(entry["release"]) for entry in entries if entry["torch"] == torch.partition("+")[0]]
    if not found:
        known = ", ".join(sorted({entry["torch"] for entry in entries}))
        raise EnvironmentSetupError(f"No supported release of SGLang is made for torch {torch}; there are: {known}.")
    return found[-1]


def described(manifest: Manifest) -> Iterable[str]:
    """What was packed, a line each."""
    facts = manifest.facts
    total = sum(file.size for file in manifest.files) / _MEGABYTE
    yield (
        f"{len(manifest.files)} wheels, {total:.1f} MB, of SGLang {facts['release']} for Python {facts['python']} on "
        f"Linux x86_64, beside torch {facts['torch']} and a GPU of {facts['architecture']}"
    )
    yield from (f"  {piece.name}  {piece.size / _MEGABYTE:5.1f} MB  {piece.sha256}" for piece in manifest.pieces)


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect the wheels that ci/gpu_check needs on a machine without a package index, in pieces."""
    parser = argparse.ArgumentParser(prog="ci/gpu_wheels", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-wheels"), help="folder to write, which must not exist")
    parser.add_argument("--piece-mb", type=float, default=60, help="at most so many MB (10**6 bytes) a piece")
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU: 3.11, 3.12 or 3.13")
    parser.add_argument("--without", action="append", default=[], help="a package that the machine has; repeatable")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--release", default=environment.supported()[-1], help="of SGLang; the newest unless said")
    which.add_argument("--torch", help="that the machine has, such as 2.11.0: takes the newest release made for it")
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out} is there already; remove it, or name another folder")
    try:
        release = release_for(options.torch) if options.torch else options.release
        plan = environment.planned(release, "gpu")
        environment.check_machine(plan)
        manifest = collect(
            Wanted(plan, options.python, tuple(options.without)), options.out, int(options.piece_mb * _MEGABYTE)
        )
    except (EnvironmentSetupError, OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(options.out, ignore_errors=True)
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(described(manifest)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
