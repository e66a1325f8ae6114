# SPDX-License-Identifier: Apache-2.0
"""Parts of messages."""

from __future__ import annotations

from collections.abc import Sequence

MAX_LISTED = 8
"""Names that a message lists before it says "and N more"."""


def shortened(names: Sequence[str]) -> str:
    """``names`` for a message, at most ``MAX_LISTED`` of them."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def sentence(text: object) -> str:
    """``text`` (for example an error) with exactly one full stop at its end."""
    return f"{str(text).rstrip('.')}."


def annotate(error: BaseException, note: str) -> None:
    """Add a line to an error's message."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10
        error.args = (*error.args, note)
