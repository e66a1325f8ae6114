"""Writes `sglang_overlay/hooks/bodies.json`: fingerprints of each hooked function in each supported release, with the
patch series, if there is one, and without.

Each release's own package is fetched once. With --check nothing is written; the exit code is 1 if the file is stale.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path

from sglang_overlay import patches
from sglang_overlay.hooks import bodies
from workbench.releases import environment, make_patches, new_release, patched

_CHANGED = re.compile(r"^--- a/python/(\S+)$", re.MULTILINE)
FILE = environment.CLONE / "sglang_overlay" / "hooks" / bodies.DATA


def made() -> str:
    """The file's text."""
    roots = {release: new_release.fetch(release) for release in environment.supported()}
    with tempfile.TemporaryDirectory() as scratch:
        trees = {
            release: _patched(release, root, Path(scratch) / release)
            for release, root in roots.items()
            if make_patches.stored(release)
        }
        return json.dumps(bodies.described(roots, trees), indent=1) + "\n"


def _patched(release: str, root: Path, folder: Path) -> Path:
    """The folder that contains the release's package with the series: only files that the series changes or adds."""
    series = patches.files_of(release)
    changed = {path for file in series for path in _CHANGED.findall(file.read_text(encoding="utf-8"))}
    for path in filter(lambda path: (root / path).is_file(), changed):
        copied = folder / "python" / path
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / path, copied)
    patched.apply_with_patch(folder, series)
    return folder / "python"


def main(arguments: list[str] | None = None) -> int:
    """Parse, write or check."""
    parser = argparse.ArgumentParser(
        prog="ci/bodies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    text = made()
    if not options.check:
        FILE.write_text(text, encoding="utf-8")
    elif FILE.read_text(encoding="utf-8") != text:
        print(f"problem: {FILE} is stale; run ci/bodies", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
