"""Makes `patches/<release>/`: the series that puts streaming into that release's source tree, as `git am` takes it.

Each release's own package is fetched once. The same sources and the same release always give the same text.
With --check nothing is written; the exit code is 1 where a series is not what would be made.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from workbench.releases import environment, misfits, new_release, series
from workbench.releases.edits import EditError
from workbench.releases.repository import commit, git

FOLDER = environment.CLONE / "patches"
SERIES = "series"


def made(package: Path) -> dict[str, str]:
    """The series of a release: names and texts of its files, including `series`.

    Args:
        package: folder that contains the release's `sglang` package.

    Raises:
        EditError: an edit does not fit the release.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repository, out = folder / "tree", folder / "out"
        repository.mkdir()
        git(repository, "init", "--quiet", "--initial-branch=main")
        commit(repository, series.touched(package), "release")
        for message, files in series.commits(package):
            commit(repository, files, message)
        git(repository, "format-patch", *_FORMAT, f"--output-directory={out}", f"HEAD~{len(series.PATCHES)}")
        patches = {file.name: file.read_text(encoding="utf-8") for file in sorted(out.iterdir())}
    return {**patches, SERIES: "".join(f"{name}\n" for name in patches)}


_FORMAT = (
    "--quiet",
    "--zero-commit",
    "--no-signature",
    "--full-index",
    "--no-renames",
    "--stat=80",
    "--diff-algorithm=myers",
)


def stored(release: str) -> dict[str, str]:
    """The series of a release as stored in the clone."""
    folder = FOLDER / release
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file.name: file.read_text(encoding="utf-8") for file in files}


def store(release: str, files: Mapping[str, str]) -> None:
    """Replace the series of a release."""
    folder = FOLDER / release
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def stale(release: str, package: Path) -> list[str]:
    """Names of a release's files that differ from what would be made, including missing and extra files."""
    found, wanted = stored(release), made(package)
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def line_counts(files: Mapping[str, str]) -> Iterator[tuple[str, int, int]]:
    """Each patch with the lines it adds, to code and to tests or documentation."""
    for name, text in files.items():
        if name != SERIES:
            is_code = [path.startswith("python/") for path, _ in _added(text)]
            yield name, sum(is_code), len(is_code) - sum(is_code)


def fingerprint(files: Mapping[str, str]) -> str:
    """Hash of the code that a series adds; tests, documentation and messages do not change it."""
    patches = (text for name, text in files.items() if name != SERIES)
    code = ((path, line) for text in patches for path, line in _added(text) if path.startswith("python/"))
    return environment.digest("".join(f"{path}{line}\n" for path, line in code))


def _added(patch: str) -> Iterator[tuple[str, str]]:
    """Each line that a patch adds, and the path of its file."""
    path = ""
    for line in patch.splitlines():
        if line.startswith("+++ b/"):
            path = line.removeprefix("+++ b/")
        elif line.startswith("+"):
            yield path, line


def main(arguments: list[str] | None = None) -> int:
    """Parse, make or check, print."""
    parser = argparse.ArgumentParser(
        prog="ci/make_patches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--release", default="all", help=f"all (default), or one of {', '.join(environment.supported())}"
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    releases = environment.supported() if options.release == "all" else [options.release]
    problems = []
    for release in releases:
        package = new_release.fetch(release)
        try:
            if options.check:
                problems += [
                    f"patches/{release}/{name} is stale; run ci/make_patches" for name in stale(release, package)
                ]
                continue
            files = made(package)
        except EditError as error:
            problems.append(misfits.explained(error, package, release))
            continue
        store(release, files)
        for name, code, other in line_counts(files):
            print(f"{release}/{name}: +{code} lines of code, +{other} of tests and documentation")
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
