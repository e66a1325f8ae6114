"""Edits that do not fit a release, explained by what SGLang has changed there since a release that they fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

from packaging.version import Version

from workbench.releases import environment, new_release, series
from workbench.releases.edits import Edit, EditError, Hunk, Read, fitting, lines_of


def explained(error: EditError, package: Path, release: str) -> str:
    """Each misfit of a patch, and a diff of the place from the nearest release where the edit fits to this one.

    Args:
        error: what making the series raised.
        package: folder that contains the release's `sglang` package.
        release: its version.
    """
    parts = [f"SGLang {release}:"]
    for edit, why in error.misfits:
        changes = next(_changes(edit, error.patch, package, release), "It fits no supported release.")
        parts.append(f"patch {error.patch} does not fit: {why}\n{changes}")
    return "\n\n".join(parts)


def _changes(edit: Edit, patch: int, package: Path, release: str) -> Iterator[str]:
    """A diff from each release that the edit fits: first earlier releases, since those were there before the change."""
    known = [name for name in environment.supported() if Version(name) != Version(release)]
    earlier = [name for name in known if Version(name) < Version(release)]
    for name in (*reversed(earlier), *known[len(earlier) :]):
        other = new_release.fetch(name)
        try:
            fit = fitting(series.before(other, patch), edit)
        except EditError:
            continue
        if fit is not None:
            yield _diff(fit[0], series.reader(other), series.reader(package), name, release)


def _diff(hunk: Hunk, was: Read, now: Read, before: str, after: str) -> str:
    lines = difflib.unified_diff(_lines(was, hunk), _lines(now, hunk), before, after, lineterm="")
    return "\n".join(lines) or f"It has not changed since {before}, but what an earlier patch leaves there has."


def _lines(read: Read, hunk: Hunk) -> list[str]:
    text = read(hunk.path) or ""
    lines = text.split("\n")
    place = [lines[number] for number in sorted(lines_of(text, hunk.place))]
    # Outside of functions and classes, most lines are those between them.
    return place if hunk.place else [line for line in place if line]
