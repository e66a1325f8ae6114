"""Writes `sglang_overlay/hooks/bodies.json`: fingerprints of each hooked function in each supported release.

Each release's own package is fetched once. With --check nothing is written; the exit code is 1 if the file is stale.
"""

from __future__ import annotations

import argparse
import json
import sys

from sglang_overlay.hooks import bodies
from workbench.releases import environment, new_release

FILE = environment.CLONE / "sglang_overlay" / "hooks" / bodies.DATA


def made() -> str:
    """The file's text."""
    roots = {release: new_release.fetch(release) for release in environment.supported()}
    return json.dumps(bodies.described(roots), indent=1) + "\n"


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
