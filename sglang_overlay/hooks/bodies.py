# SPDX-License-Identifier: Apache-2.0
"""Compare hooked functions with those of supported releases, by the fingerprints in ``bodies.json`` (``ci/bodies``).

Functions that a hooked function calls are not compared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sglang_overlay.hooks import source_tree
from sglang_overlay.hooks.catalogue import STREAMING

DATA = "bodies.json"


def unknown(root: Path) -> tuple[str, ...]:
    """Names of hooked functions whose bodies no supported release has.

    Args:
        root: folder that contains the ``sglang`` package.
    """
    known = _data()
    files = {path: _digest(root / path) for release in known["files"].values() for path in release}
    if any(published.items() <= files.items() for published in known["files"].values()):
        return ()  # The files are those of a supported release, which is cheaper to check.
    functions: dict[str, dict[str, list[str]]] = known["functions"]
    found = {target: source.fingerprint for target, source in hooked(root).items()}
    return tuple(target for target, fingerprint in found.items() if fingerprint not in functions.get(target, {}))


def hooked(root: Path) -> dict[str, source_tree.Source]:
    """The functions that streaming hooks, by name, where this release has them; missing ones are left out."""
    states = source_tree.inspect_hooks(root, STREAMING)
    found = {state.hook.target: source_tree.find(root, state.hook.target) for state in states if state.state.fits}
    return {target: source for target, source in found.items() if source is not None}


def described(roots: Mapping[str, Path], patched: Mapping[str, Path] | None = None) -> dict[str, Any]:
    """The contents of ``bodies.json``: digests of files by release, and releases by each function's fingerprint.

    Args:
        roots: for each supported release, oldest first, the folder that contains its ``sglang`` package.
        patched: the same with the patch series; files of these are not described.
    """
    files: dict[str, dict[str, str]] = {}
    functions: dict[str, dict[str, list[str]]] = {}
    for release, root in roots.items():
        sources = hooked(root)
        paths = sorted({source.file.relative_to(root).as_posix() for source in sources.values()})
        files[release] = {path: _digest(root / path) for path in paths}
        _add(functions, release, sources)
    for release, root in (patched or {}).items():
        _add(functions, release, hooked(root), suffix=" with the series")
    return {"files": files, "functions": dict(sorted(functions.items()))}


def _add(
    functions: dict[str, dict[str, list[str]]],
    release: str,
    sources: Mapping[str, source_tree.Source],
    suffix: str = "",
) -> None:
    for target, source in sources.items():
        known = functions.setdefault(target, {}).setdefault(source.fingerprint, [])
        if release not in known:
            known.append(f"{release}{suffix}")


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(resources.files(__package__).joinpath(DATA).read_text(encoding="utf-8"))
    return data


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""
