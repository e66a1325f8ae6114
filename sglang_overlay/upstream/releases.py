# SPDX-License-Identifier: Apache-2.0
"""Which SGLang releases are supported; the facts are in ``releases.json``.

A release newer than all of these is streamed as well where every function that is hooked is as in the newest one.
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


def is_untested() -> bool:
    """Whether the installed SGLang is newer than all supported releases."""
    version = installed()
    if version is None:
        return False
    from packaging.version import Version

    return Version(version) > Version(supported()[-1])


def unsupported_reason() -> str | None:
    """Why fp8 loads in the installed SGLang cannot be streamed, or None where they can."""
    from packaging.version import Version

    version = installed()
    if version is None:
        return "SGLang is not installed"
    if Version(version).public in {Version(release).public for release in supported()}:
        return None
    listed = f"supported: {', '.join(supported())}"
    if not is_untested():
        return f"SGLang {version} is not a supported release ({listed})"
    changed = _changed_since_newest()
    return f"SGLang {version} is an untested release ({listed}), and it has changed: {changed}" if changed else None


def untested_note() -> str:
    """What to say of an untested release that is streamed."""
    return (
        f"SGLang {installed()} is an untested release, newer than {supported()[-1]}. All functions that are hooked "
        "look as expected, so fp8 loads are streamed."
    )


def _changed_since_newest() -> str:
    """Touch points that are not as in the newest supported release, whose own are all there."""
    from sglang_overlay.upstream import source_tree
    from sglang_overlay.upstream.catalogue import STREAMING
    from sglang_overlay.upstream.touch_point import State, listed

    found = util.find_spec("sglang")
    if found is None or found.origin is None:
        return "its source files are not there to compare"
    states = source_tree.inspect_points(Path(found.origin).parents[1], STREAMING)
    return listed(state for state in states if state.state is not State.READY)
