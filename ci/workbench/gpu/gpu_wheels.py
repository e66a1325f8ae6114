# SPDX-License-Identifier: Apache-2.0
"""Collect what SGLang needs on a machine with a GPU, CUDA and PyTorch but no package index: a folder to import from.

    site/          a release's lock, installed without the packages in ``ci/locks/gpu_machine.txt`` and :data:`DROPPED`
    jit/           SGLang's kernels that are compiled on first use, compiled for Hopper if nvcc is available
    row_kernels/   sources of the newest release's row quantizer, which is checked there too

Standard library only: nothing is installed where this runs.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Run as a file, by any Python.
if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[above]) for above in (2, 3)]

from workbench.gpu import gpu_modules, pieces
from workbench.gpu.pieces import Manifest
from workbench.releases import environment
from workbench.releases.environment import CLONE, EnvironmentSetupError, Plan, normalized

LEFT_OUT = Path("ci", "locks", "gpu_machine.txt")
"""The file, in a clone, with names of packages that are not collected."""
KEPT = ("sgl_kernel/sm90/*",)
"""Kernels for Hopper, kept although the patterns below match. sglang-kernel has a folder for each generation."""
DROPPED = (
    "bin/*",
    "*.a",
    "sgl_kernel/*.so",
    # SGLang's diffusion models, its tests, and its servers in Rust and for gRPC.
    "sglang/multimodal_gen/*",
    "sglang/test/*",
    "sglang/srt/*/_core.*.so",
    "torch_memory_saver_hook_mode_*_cu12.*",
    "zstandard/_cffi.*",
)
"""Files that are not carried, as patterns over their paths in ``site``."""
ROW_SOURCES = ("kernels/jit/csrc/gemm/per_token_quant_fp8.cuh", "kernels/jit/include/*")
"""Path in the newest release's wheel, below ``sglang/``."""
_JIT = "sglang/kernels/jit/"
_MEGABYTE = 10**6
_ROW = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[^ ;\\]+)", re.MULTILINE)


@dataclass(frozen=True)
class Wanted:
    """What to collect: the SGLang release, and the Python version, such as ``3.12``."""

    plan: Plan
    python: str

    @property
    def requirements(self) -> str:
        """The collected packages' lines of the lock, with hashes."""
        return environment.without(self.plan.locked, self.left_out)

    @property
    def left_out(self) -> frozenset[str]:
        """Names in the lock that are not collected."""
        patterns = environment.names_in(self.plan.clone / LEFT_OUT)
        return frozenset(name for name in self.versions if any(fnmatch.fnmatch(name, one) for one in patterns))

    @property
    def versions(self) -> dict[str, str]:
        """Version of every package in the lock."""
        rows = _ROW.finditer(self.plan.locked)
        return {normalized(row["name"]): row["version"] for row in rows}


def collect(wanted: Wanted, out: Path, piece_bytes: int) -> Manifest:
    """Install, drop, compile and pack; ``out`` must not exist.

    Raises:
        EnvironmentSetupError: a download failed.
    """
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix=".folder-", dir=out) as scratch:
        folder = Path(scratch)
        _install(wanted, folder / "site")
        drop(folder / "site")
        _row_sources(wanted.plan, folder / gpu_modules.ROW_KERNELS)
        facts = {
            "release": wanted.plan.release,
            "python": wanted.python,
            "torch": wanted.versions["torch"],
            "compiled": _compile(wanted.plan, folder),
            "left_out": sorted(wanted.left_out),
        }
        return pieces.pack(folder, out, piece_bytes, **facts)


def drop(site: Path) -> None:
    """Remove the files that are not carried."""
    for path in [path for path in site.rglob("*") if path.is_file()]:
        name = path.relative_to(site).as_posix()
        if _is_any(name, DROPPED) and not _is_any(name, KEPT):
            path.unlink()


def _is_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _install(wanted: Wanted, site: Path) -> None:
    _pip(wanted, "install", "--target", str(site), "--no-compile", listed=wanted.requirements)


def _pip(wanted: Wanted, *command: str, listed: str) -> None:
    pip = environment.ensure_uv(wanted.plan).with_name("python")
    wheels = [
        *("--no-deps", "--require-hashes", "--only-binary", ":all:"),
        *("--python-version", wanted.python, "--implementation", "cp"),
        *(part for platform in _platforms() for part in ("--platform", platform)),
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as listing:
        listing.write(listed)
        listing.flush()
        arguments = ["-qq", "--disable-pip-version-check", *command[1:], *wheels, "-r", listing.name]
        environment.step(wanted.plan, [str(pip), "-m", "pip", command[0], *arguments])


def _platforms() -> list[str]:
    """All platform tags that pip may use: it does not accept older ones by itself."""
    numbered = [f"manylinux_2_{number}_x86_64" for number in range(34, 4, -1)]
    return [*numbered, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]


def _row_sources(plan: Plan, target: Path) -> None:
    """Extract the newest release's row quantizer and its headers from that release's wheel."""
    newest = Wanted(environment.planned(environment.supported()[-1], "gpu", plan.clone), "3.12")
    others = frozenset(newest.versions) - {"sglang"}
    only = environment.without(newest.plan.locked, others)
    with tempfile.TemporaryDirectory() as scratch:
        _pip(newest, "download", "--dest", scratch, listed=only)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            extract_row_sources(archive, target)


def extract_row_sources(archive: zipfile.ZipFile, target: Path) -> None:
    """Extract ``csrc/`` and ``include/`` from a wheel of SGLang to below ``target``."""
    for name in archive.namelist():
        if not name.endswith("/") and _is_any(name, [f"sglang/{pattern}" for pattern in ROW_SOURCES]):
            path = target / name.removeprefix(_JIT)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))


def _compile(plan: Plan, folder: Path) -> int:
    """Compile kernels with this machine's nvcc, in the release's environment; returns their number.

    They are kept between calls, since names depend on sources.
    """
    cache = plan.cache / f"kernels-{plan.release}"
    (folder / "jit").mkdir()
    if shutil.which("nvcc") is None:
        environment.say("no nvcc here: kernels will be compiled on the machine with the GPU")
        return 0
    cache.mkdir(parents=True, exist_ok=True)
    python = environment.ensure(environment.planned(plan.release, "cpu", plan.clone))
    variables = {**os.environ, "PYTHONPATH": str(CLONE / "ci"), gpu_modules.CACHE_VARIABLE: str(cache)}
    headers = str(folder / gpu_modules.ROW_KERNELS)
    command = [str(python), "-P", "-m", "workbench.gpu.gpu_modules", "--headers", headers]
    subprocess.run(command, env=variables, stdout=sys.stderr, check=True)
    for path in gpu_modules.compiled(cache):
        target = folder / "jit" / path.relative_to(cache)
        target.parent.mkdir()
        shutil.copy(path, target)
    return len(list((folder / "jit").iterdir()))


def release_for(torch: str, clone: Path = CLONE) -> str:
    """The newest supported release for this version of torch.

    Raises:
        EnvironmentSetupError: there is none.
    """
    entries = json.loads((clone / environment.RELEASES).read_text(encoding="utf-8"))["supported"]
    found = [str(entry["release"]) for entry in entries if entry["torch"] == torch.partition("+")[0]]
    if not found:
        known = ", ".join(sorted({entry["torch"] for entry in entries}))
        raise EnvironmentSetupError(f"No supported release of SGLang is made for torch {torch}; there are: {known}.")
    return found[-1]


def described(manifest: Manifest) -> Iterator[str]:
    """A description of what was packed, line by line."""
    facts = manifest.facts
    yield (
        f"SGLang {facts['release']} for Python {facts['python']} on Linux x86_64, beside torch {facts['torch']} and a "
        f"Hopper GPU, {facts['compiled']} kernels compiled: {manifest.unpacked / _MEGABYTE:.0f} MB unpacked"
    )
    yield from (f"  {piece.name}  {piece.size / _MEGABYTE:5.1f} MB  {piece.sha256}" for piece in manifest.pieces)


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect what ci/gpu_check needs on a machine without a package index, in pieces."""
    parser = argparse.ArgumentParser(prog="ci/gpu_wheels", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-wheels"), help="folder to write, which must not exist")
    parser.add_argument("--piece-mb", type=float, default=52, help="at most so many MB (10**6 bytes) a piece")
    parser.add_argument("--python", default="3.12", help="of the machine with the GPU: 3.11, 3.12 or 3.13")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--release", help="of SGLang")
    which.add_argument("--torch", default="2.11.0", help="that the machine has: takes the newest release made for it")
    options = parser.parse_args(arguments)
    if options.out.exists():
        parser.error(f"{options.out} is there already; remove it, or name another folder")
    try:
        plan = environment.planned(options.release or release_for(options.torch), "gpu")
        environment.check_machine(plan)
        manifest = collect(Wanted(plan, options.python), options.out, int(options.piece_mb * _MEGABYTE))
    except (EnvironmentSetupError, OSError, subprocess.SubprocessError) as error:
        shutil.rmtree(options.out, ignore_errors=True)
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(described(manifest)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
