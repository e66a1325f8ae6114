# SPDX-License-Identifier: Apache-2.0
"""Which SGLang releases are supported; the facts are in ``releases.json``.

Any other release that is not older than all of these is streamed as well, if every hooked function has the expected
parameters. It is untested if one of them has a body that no supported release has (``bodies.py``).
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
        python: Python versions that it runs on.
        torch: version that it pins, like ``transformers``.
        absent: targets of hooks that it does not have.
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
    """Version of the SGLang installed, without a local part such as that of a fork (``+streamfp8``), or None."""
    try:
        return metadata.version("sglang").partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def root() -> Path | None:
    """Folder that contains the installed ``sglang`` package, found without importing it; None if there is none."""
    found = util.find_spec("sglang")
    return None if found is None or found.origin is None else Path(found.origin).parents[1]


def absent() -> tuple[str, ...]:
    """Targets of hooks that the installed SGLang does not have; empty unless it is a supported release."""
    return next((entry.absent for entry in facts() if entry.release == installed()), ())
