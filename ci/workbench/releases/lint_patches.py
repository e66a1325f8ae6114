"""Runs SGLang's own linters over what a release's patch series leaves, as `pre-commit` does in SGLang's repository.

Only what the series brings is reported, not what the release's own files had before. Besides the linters: its check
that each file under `test/registered` is registered and can be run, and its rule that code is ASCII.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from packaging.version import Version

from workbench.releases import environment, new_release, series

SUITES = frozenset(
    {
        "base-a-test-cpu",
        "base-b-test-1-gpu-small",
        "base-b-test-1-gpu-large",
        "stage-b-test-1-gpu-small-amd",
        "stage-b-test-1-gpu-small-amd-mi35x",
    }
)
"""Suites that run on every pull request of all supported releases; SGLang's `test/run_suite.py` stops at another."""
_FORMATTED_BY_RUFF_SINCE = Version("0.5.20")
_IGNORED_WORDS = (
    "ans,als,hel,boostrap,childs,te,vas,hsa,ment,cann,thi,makro,wil,rouge,PRIS,ather,MIS,medias,allready,inout,nd,fo,"
    "visibles,nothink,renderD"
)
"""As in SGLang's `.codespellrc`."""


def linters(release: str) -> Iterator[list[str]]:
    """The commands of SGLang's hooks, without files."""
    black = Version(release) < _FORMATTED_BY_RUFF_SINCE
    yield ["black", "--diff", "--quiet", "--check"] if black else ["ruff", "format", "--isolated", "--diff"]
    yield ["isort", "--check-only", "--profile=black", "--known-first-party=sglang"]
    yield ["ruff", "check", "--isolated", "--quiet", "--output-format=concise", "--select=F401,F821,UP037"]
    yield ["codespell", f"--ignore-words-list={_IGNORED_WORDS}"]


def complaints(release: str, files: Mapping[str, str], before: Mapping[str, str], tools: Path) -> list[str]:
    """What the linters say of these files, and did not say of them as they were before.

    Args:
        release: decides which formatter is asked.
        files: contents by path.
        before: the same for the release's own files among them.
        tools: folder with the linters' programs.
    """
    known = {_without_line(said) for said in _said(release, before, tools)}
    found = [said for said in _said(release, files, tools) if _without_line(said) not in known]
    return found + [said for path, text in files.items() if path not in before for said in _plain(path, text)]


def unregistered(files: Mapping[str, str], package: Path) -> list[str]:
    """What SGLang's test runner has against the registered tests among these files.

    Args:
        files: contents by path.
        package: folder that contains the release's `sglang` package, whose parser is asked.
    """
    spec = importlib.util.spec_from_file_location("ci_register", package / "sglang/test/ci/ci_register.py")
    assert spec is not None
    assert spec.loader is not None
    register = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = register
    spec.loader.exec_module(register)
    problems = []
    with tempfile.TemporaryDirectory() as name:
        for path, text in files.items():
            if not path.startswith("test/registered/") or Path(path).name in {"conftest.py", "__init__.py"}:
                continue
            _write(Path(name), {path: text})
            try:
                tests = register.collect_tests([str(Path(name, path))])
            except ValueError as error:
                problems.append(str(error).replace(f"{name}/", ""))
                continue
            unknown = {getattr(test, "effective_suite", test.suite) for test in tests} - SUITES
            problems += [f"{path}: no suite of every supported release: {suite}" for suite in sorted(unknown)]
    return problems


def _said(release: str, files: Mapping[str, str], tools: Path) -> list[str]:
    python = {path: text for path, text in files.items() if path.endswith(".py")}
    said: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        _write(Path(name), files)
        for program, *arguments in linters(release) if files else ():
            paths = files if program == "codespell" else python
            command = [str(tools / program), *arguments, *paths]
            done = subprocess.run(command, cwd=name, capture_output=True, text=True, check=False)
            if done.returncode:
                text = (done.stdout + done.stderr).replace(f"{name}/", "").strip()
                said += [f"{program}: {line}" for line in text.splitlines()]
    return said


def _without_line(said: str) -> str:
    return re.sub(r":\d+(:\d+)?:", ":", said)


def _plain(path: str, text: str) -> Iterator[str]:
    if not text.endswith("\n") or text.endswith("\n\n"):
        yield f"{path}: does not end with one line break"
    for number, line in enumerate(text.splitlines(), 1):
        if line != line.rstrip():
            yield f"{path}:{number}: trailing whitespace"
        if path.endswith(".py") and not line.isascii():
            yield f"{path}:{number}: not ASCII"


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Run SGLang's linters over the patch series; exit with 1 if they complain."""
    parser = argparse.ArgumentParser(prog="ci/lint_patches", description=main.__doc__)
    parser.add_argument("--release", default=environment.supported()[-1], help="a supported release, or all")
    parser.add_argument("--tools", type=Path, required=True, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    failed = False
    for release in environment.supported() if options.release == "all" else [options.release]:
        package = new_release.fetch(release)
        files: dict[str, str] = {}
        for _, changed in series.commits(package):
            files.update(changed)
        found = complaints(release, files, series.touched(package), options.tools) + unregistered(files, package)
        print(*found or [f"SGLang's linters have nothing against the series for {release}."], sep="\n")
        failed = failed or bool(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
