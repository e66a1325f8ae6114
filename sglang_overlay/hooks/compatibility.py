# SPDX-License-Identifier: Apache-2.0
"""Whether the hooks fit the installed SGLang, a supported release or a newer one."""

from __future__ import annotations

from functools import cache

from sglang_overlay.hooks import bodies, releases, source_tree
from sglang_overlay.hooks.catalogue import STREAMING
from sglang_overlay.hooks.hook import State, listed


def unsupported_reason() -> str | None:
    """Why the installed SGLang's fp8 loads cannot be streamed; None if they can."""
    from packaging.version import Version

    version = releases.installed()
    if version is None:
        return "SGLang is not installed"
    if Version(version).public in {Version(release).public for release in releases.supported()}:
        return None
    tested = f"supported: {', '.join(releases.supported())}"
    earlier = [entry for entry in releases.facts() if Version(entry.release) < Version(version)]
    if not earlier:
        return f"SGLang {version} is not a supported release ({tested})"
    changed = _changed_since(earlier[-1])
    return f"SGLang {version} is not a supported release ({tested}), and it has changed: {changed}" if changed else None


@cache
def untested_note() -> str | None:
    """A sentence or two about what is untested in the installed SGLang; None if nothing is."""
    root = releases.root()
    changed = () if root is None else bodies.unknown(root)
    if not changed:
        return None
    return (
        f"SGLang {releases.installed()} is untested: these functions that are hooked have bodies that no supported "
        f"release ({', '.join(releases.supported())}) has: {', '.join(changed)}. They take what they should."
    )


def _changed_since(release: releases.Release) -> str:
    """A message: hooks that do not fit the installed SGLang, or whose targets only ``release`` has; may be empty."""
    root = releases.root()
    if root is None:
        return "its source files are not there to compare"
    states = source_tree.inspect_hooks(root, STREAMING)
    return listed(
        state
        for state in states
        if not state.state.fits or (state.state is State.ABSENT and state.hook.target not in release.absent)
    )
