# SPDX-License-Identifier: Apache-2.0
"""Whether hooked functions do what they do in a supported release, as ``bodies.json`` has it (``ci/bodies`` writes it).

What a hooked function calls is not looked at.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sglang_overlay.hooks import source_tree
from sglang_overlay.hooks.catalogue import STREAMING

DATA = "bodies.json"


def unknown(root: Path) -> tuple[str, ...]:
    """Hooked functions whose bodies no supported release has, by their names.

    Args:
        root: folder that the ``sglang`` package lies in.
    """
    known = _data()
    files = {path: _digest(root / path) for release in known["files"].values() for path in release}
    if any(published.items() <= files.items() for published in known["files"].values()):
        return ()  # The files are a supported release's own, which costs less to see.
    functions: dict[str, dict[str, list[str]]] = known["functions"]
    found = {target: source.fingerprint for target, source in hooked(root).items()}
    return tuple(target for target, fingerprint in found.items() if fingerprint not in functions.get(target, {}))


def hooked(root: Path) -> dict[str, source_tree.Source]:
    """The functions that are hooked where streaming hooks them, by their names; those left out that are not there."""
    states = source_tree.inspect_hooks(root, STREAMING)
    found = {state.hook.target: source_tree.find(root, state.hook.target) for state in states if state.state.fits}
    return {target: source for target, source in found.items() if source is not None}


def described(roots: dict[str, Path]) -> dict[str, Any]:
    """What ``bodies.json`` holds: digests of files by release, and releases by what a function's body is.

    Args:
        roots: of each supported release, oldest first.
    """
    files: dict[str, dict[str, str]] = {}
    functions: dict[str, dict[str, list[str]]] = {}
    for release, root in roots.items():
        sources = hooked(root)
        paths = sorted({source.file.relative_to(root).as_posix() for source in sources.values()})
        files[release] = {path: _digest(root / path) for path in paths}
        for target, source in sources.items():
            functions.setdefault(target, {}).setdefault(source.fingerprint, []).append(release)
    return {"files": files, "functions": dict(sorted(functions.items()))}


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(resources.files(__package__).joinpath(DATA).read_text(encoding="utf-8"))
    return data


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""
