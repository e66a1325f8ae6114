"""Resolves `ci/locks/<name>.in` into `ci/locks/<name>.txt`: ci/lock 0.5.23, or ci/lock uv, docs, ...

An existing lock's versions are kept where they still fit; delete it first to take the newest. Where the input begins
`# on <release>.txt`, that release's versions are kept, and only what differs from its lock is written. Packages in
`wheels.txt` stand in for pins that no wheel satisfies, where there is no solution without. An input that begins
`# alone` is taken without what its packages need.

Runs with uv's own Python, so it uses the standard library only.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from workbench.releases import environment

LOCKS = environment.CLONE / "ci" / "locks"
ALONE = "# alone"
OPTIONS = (
    *("--quiet", "--generate-hashes", "--only-binary", ":all:"),
    *("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_34"),
)


def resolved(name: str, known: str) -> str:
    """The complete lock, with the versions of the lock `known` where they fit.

    Raises:
        subprocess.CalledProcessError: there is no solution; uv has said why.
    """
    plan = environment.planned()
    uv = environment.ensure_uv(plan)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, f"{name}.txt")
        out.write_text(known, encoding="utf-8")
        source = os.path.relpath(LOCKS / f"{name}.in", environment.CLONE)
        command = [str(uv), "pip", "compile", source, "--output-file", str(out), *OPTIONS]
        command += ["--custom-compile-command", f"ci/lock {name}"]
        command += (
            ["--no-deps"] if Path(environment.CLONE, source).read_text(encoding="utf-8").startswith(ALONE) else []
        )
        run = partial(
            subprocess.run, cwd=environment.CLONE, env=environment.step_environment(plan), stdout=subprocess.DEVNULL
        )
        if run(command, stderr=subprocess.DEVNULL).returncode:
            run([*command, "--override", os.path.relpath(LOCKS / "wheels.txt", environment.CLONE)], check=True)
        return out.read_text(encoding="utf-8")


def difference(lock: str, release: str, parent: str) -> str:
    """The lock as put on its parent's: what the parent has otherwise or not at all. Comments do not count."""
    own, others = environment.entries(lock), environment.entries(parent)
    same = (name for name in own if name in others and _bare(own[name]) == _bare(others[name]))
    dropped = " ".join(sorted(others.keys() - own.keys()))
    return f"# on {release}.txt{' without ' * bool(dropped)}{dropped}\n" + environment.without(lock, frozenset(same))


def _bare(entry: str) -> str:
    return re.sub(r"^ *#.*\n", "", entry, flags=re.MULTILINE)


def main(arguments: list[str] | None = None) -> int:
    """Resolve one input, and write its lock."""
    parser = argparse.ArgumentParser(
        prog="ci/lock", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of a file in ci/locks, without .in")
    name = parser.parse_args(arguments).name
    target = LOCKS / f"{name}.txt"
    on = environment.PUT_ON.match((LOCKS / f"{name}.in").read_text(encoding="utf-8"))
    parent = "" if on is None else environment.planned(on["release"]).locked
    lock = resolved(name, environment.planned(name).locked if target.exists() else parent)
    target.write_text(lock if on is None else difference(lock, on["release"], parent), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
