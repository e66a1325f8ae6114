# SPDX-License-Identifier: Apache-2.0
"""Schemes by name: those of this package, and those that other packages register.

Another package registers its schemes in the entry point group ``sglang_streamfp8.schemes``; each entry point names a
``Scheme`` object. It is imported only when a user asks for it.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, cast

from sglang_overlay.errors import SchemeError
from sglang_overlay.schemes.choice import MXFP8, NONE, STOCK, SchemeChoice

if TYPE_CHECKING:
    from sglang_overlay.schemes.scheme import Scheme

GROUP = "sglang_streamfp8.schemes"

BUILT_IN = {
    "tensor": "sglang_overlay.schemes.granularity:TENSOR",
    "channel": "sglang_overlay.schemes.granularity:CHANNEL",
    "block": "sglang_overlay.schemes.block:BLOCK",
    "int8": "sglang_overlay.schemes.int8:INT8",
}


@cache
def entry_points() -> dict[str, metadata.EntryPoint]:
    """Every scheme by name, not yet imported. Other packages cannot replace this package's schemes."""
    found = {point.name: point for point in metadata.entry_points(group=GROUP)}
    return {**found, **{name: metadata.EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}}


def valid_names() -> list[str]:
    """The names that a user can ask for."""
    return [STOCK, *entry_points(), NONE]


def check(choice: SchemeChoice) -> None:
    """Make sure that all schemes of a choice exist.

    Raises:
        SchemeError: one does not exist; the message lists those that do.
    """
    others = choice.names - {STOCK, NONE, *BUILT_IN}
    # Look for other packages' schemes only if needed: reading the installed packages takes milliseconds.
    unknown = sorted(others - set(valid_names())) if others else []
    if unknown:
        own = f" For {MXFP8} start SGLang with --quantization {MXFP8}." if MXFP8 in unknown else ""
        raise SchemeError(
            f"there is no quantization scheme {unknown[0]!r}. Use one of: {', '.join(valid_names())}.{own}"
        )


def find(name: str) -> Scheme:
    """Import a scheme.

    Raises:
        SchemeError: importing it fails.
    """
    try:
        return cast("Scheme", entry_points()[name].load())
    except Exception as error:
        raise SchemeError(f"the quantization scheme {name!r} cannot be imported: {error}") from error
