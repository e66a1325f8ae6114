# SPDX-License-Identifier: Apache-2.0
"""Programs that each import SGLang from nothing, at a sixth of what a new interpreter takes.

    with ForkedPython(folder) as python:
        ran = python.run("from sglang.srt.plugins import load_plugins", environ={"SGLANG_STREAMFP8": "0"})

Six of the seven seconds in which SGLang is imported go to other packages. They are imported once, in a process that
each program is forked from, and which has nothing of SGLang's or of this package's: what a program sets, changes or
hooks before its first import is as it would be in a process of its own.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import subprocess
import sys
import traceback
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.load_series import series_process
from sglang_overlay.settings import CPU_REFERENCE_VARIABLE

if TYPE_CHECKING:
    from types import TracebackType

_SECONDS = 300.0
_MINE = ("sglang", "sglang_overlay", "workbench", "harness")
"""Packages that each program imports by itself."""


class ForkedPython:
    """A process to fork from, started with the first program.

    Args:
        folder: for what the programs print.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ForkedPython:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def run(
        self, program: str, arguments: Sequence[str] = (), environ: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """As ``subprocess.run([sys.executable, "-c", program, *arguments], env=environ)``."""
        process = self._process = self._process or self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        printed = [self._folder / name for name in ("stdout", "stderr")]
        order = {
            "program": program,
            "arguments": list(map(str, arguments)),
            "environ": dict(os.environ if environ is None else environ),
            "printed": list(map(str, printed)),
        }
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process that programs are forked from has ended: {self._folder}")
        out, err = (path.read_text(errors="replace") for path in printed)
        return subprocess.CompletedProcess(["python", "-c", program, *arguments], int(answer), out, err)

    def _started(self) -> subprocess.Popen[str]:
        names = imported_names(self._folder)
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "harness.forked_python", str(names)]
        with (self._folder / "log.txt").open("a") as log:
            return subprocess.Popen(
                command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )


def environ_with(**variables: str) -> dict[str, str]:
    """This process's variables, of SGLang's those given; the CPU reference is asked for."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SGLANG_")}
    return {**environ, CPU_REFERENCE_VARIABLE: "1", **variables}


def imported_names(folder: Path) -> Path:
    """A file in ``folder`` with the names of what a process that loads models in SGLang has imported of others'."""
    names = folder / "names.txt"
    with series_process(_write_names, folder / "log.txt", names) as process:
        process.join(_SECONDS)
    return names


def _write_names(path: Path) -> None:
    """Names of what a process that loads models in SGLang has imported of other packages, in that order."""
    path.write_text("\n".join(name for name in sys.modules if name.partition(".")[0] not in _MINE))


def import_all(names: Path) -> None:
    """Import what ``imported_names`` lists, for processes that are forked from this one."""
    gc.disable()
    for name in names.read_text(encoding="utf-8").splitlines():
        if name not in sys.modules and not name.startswith("__"):
            with warnings.catch_warnings(action="ignore"):
                try:
                    importlib.import_module(name)
                except Exception as error:
                    # What packages put there themselves.
                    print(f"{name} is not imported: {error}", file=sys.stderr)
    # Collections in each forked process would otherwise walk, and so copy, everything that is imported.
    gc.collect()
    gc.freeze()
    gc.enable()


def _serve() -> dict[str, Any]:
    """Answer orders, each in a fork; in the fork, return its order."""
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        child = os.fork()
        if not child:
            return order
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()
    sys.exit()


def _become(order: dict[str, Any]) -> dict[str, Any]:
    """Make this the process that an order asks for; what its program sees as its globals."""
    for number, path in enumerate(order["printed"], start=1):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    os.environ.clear()
    os.environ.update(order["environ"])
    sys.argv = ["-c", *order["arguments"]]
    folders = order["environ"].get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = dict.fromkeys(["", *folders, *sys.path])
    for name in [name for name in sys.modules if name.partition(".")[0] in _MINE]:
        del sys.modules[name]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    return vars(main)


def _run(order: dict[str, Any]) -> int:
    """Run the program of an order, as the interpreter does; its exit code."""
    code = compile(order["program"], "<string>", "exec")
    try:
        exec(code, _become(order))
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _main() -> None:
    import_all(Path(sys.argv[1]))
    ended = _run(_serve())
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Taking all modules down costs as much as importing SGLang.
    os._exit(ended)


if __name__ == "__main__":
    _main()
