# SPDX-License-Identifier: Apache-2.0
"""Which SGLang releases are supported; the facts are in ``releases.json``.

Any other release, unless it is older than all of these, is streamed as well where every function that is hooked takes
what it should. It is untested where one of them has a body that no supported release has (``bodies.py``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources, util
from pathlib import Path


@dataclass(frozen=True)
class Release:
    """A supported release.

    Attributes:
        release: its version.
        date: of its publication.
        python: versions that it runs on.
        torch: version that it pins; so is ``transformers``.
        absent: targets of touch points for which it has nothing.
    """

    release: str
    date: str
    python: str
    torch: str
    transformers: str
    absent: tuple[str, ...]


@cache
def facts() -> tuple[Release, ...]:
    """All supported releases, oldest first."""
    text = resources.files(__package__).joinpath("releases.json").read_text(encoding="utf-8")
    return tuple(Release(**{**entry, "absent": tuple(entry["absent"])}) for entry in json.loads(text)["supported"])


def supported() -> tuple[str, ...]:
    """Versions of the supported releases, oldest first."""
    return tuple(entry.release for entry in facts())


def installed() -> str | None:
    """Version of the SGLang installed, or None."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def absent() -> tuple[str, ...]:
    """Targets of touch points for which the installed SGLang has nothing, where it is a supported release."""
    return next((entry.absent for entry in facts() if entry.release == installed()), ())


def unsupported_reason() -> str | None:
    """Why fp8 loads in the installed SGLang cannot be streamed, or None where they can."""
    from packaging.version import Version

    version = installed()
    if version is None:
        return "SGLang is not installed"
    if Version(version).public in {Version(release).public for release in supported()}:
        return None
    listed = f"supported: {', '.join(supported())}"
    earlier = [entry for entry in facts() if Version(entry.release) < Version(version)]
    if not earlier:
        return f"SGLang {version} is not a supported release ({listed})"
    changed = _changed_since(earlier[-1])
    return f"SGLang {version} is not a supported release ({listed}), and it has changed: {changed}" if changed else None


@cache
def untested_note() -> str | None:
    """What is untested about the installed SGLang, a sentence or two; None where nothing is."""
    from sglang_overlay.upstream import bodies

    root = _root()
    changed = () if root is None else bodies.unknown(root)
    if not changed:
        return None
    return (
        f"SGLang {installed()} is untested: these functions that are hooked have bodies that no supported release "
        f"({', '.join(supported())}) has: {', '.join(changed)}. They take what they should."
    )


def _changed_since(release: Release) -> str:
    """Touch points that do not fit the installed SGLang, or that it lacks and the release has."""
    root = _root()
    if root is None:
        return "its source files are not there to compare"
    from sglang_overlay.upstream import source_tree
    from sglang_overlay.upstream.catalogue import STREAMING
    from sglang_overlay.upstream.touch_point import State, listed

    states = source_tree.inspect_points(root, STREAMING)
    return listed(
        state
        for state in states
        if not state.state.fits or (state.state is State.ABSENT and state.point.target not in release.absent)
    )


def _root() -> Path | None:
    """The folder that the installed SGLang's package lies in."""
    found = util.find_spec("sglang")
    return None if found is None or found.origin is None else Path(found.origin).parents[1]
