# SPDX-License-Identifier: Apache-2.0
"""Which SGLang releases are supported; the facts are in ``releases.json``."""

from __future__ import annotations

import json
from functools import cache
from importlib import metadata, resources


@cache
def supported() -> tuple[str, ...]:
    """Supported releases, oldest first."""
    text = resources.files(__package__).joinpath("releases.json").read_text(encoding="utf-8")
    return tuple(entry["release"] for entry in json.loads(text)["supported"])


def installed() -> str | None:
    """Version of the SGLang installed, or None."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def unsupported_reason() -> str | None:
    """Why the installed SGLang is not supported, or None where it is."""
    from packaging.version import Version

    version = installed()
    if version is None:
        return "SGLang is not installed"
    if Version(version).public in {Version(release).public for release in supported()}:
        return None
    return f"SGLang {version} is not a supported release (supported: {', '.join(supported())})"
