# SPDX-License-Identifier: Apache-2.0
"""Errors of streaming itself. Messages name the layer, the parameter and the next step to take."""

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


class StreamFP8Error(Exception):
    """Base of all errors that streaming raises."""


def annotate(error: BaseException, note: str) -> None:
    """Add a line to an error's message."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10
        error.args = (*error.args, note)


class UnsupportedWriteError(StreamFP8Error):
    """A weight loader touched a parameter in a way that cannot be captured; the layer must take stock's path."""


class LayerNotStreamableError(StreamFP8Error):
    """A layer cannot be streamed, and part of it has been quantized already: it must be loaded again, as in stock.

    Attributes:
        parameter: the parameter's qualified name.
        layer: the layer's qualified name.
        reason: why it cannot be streamed.
    """

    def __init__(self, parameter: str, reason: str) -> None:
        super().__init__(f"{parameter}: {reason}")
        self.parameter = parameter
        self.layer = parameter.rpartition(".")[0]
        self.reason = reason


class ConflictingWriteError(LayerNotStreamableError):
    """Part of a unit was written again, with other values, after the unit had been quantized."""


class UnsupportedDtypeError(StreamFP8Error):
    """A loader tried to write an integer tensor into a weight: the checkpoint is already quantized some other way."""


class UnexpectedParametersError(StreamFP8Error):
    """Upstream created parameters for a layer that this package does not know; the layer must take stock's path."""


class StagingMemoryError(StreamFP8Error):
    """Memory ran out while a weight was streamed. ``__cause__`` is torch's own error."""


class NonFiniteWeightError(StreamFP8Error):
    """The checkpoint holds NaN or Inf, and the user asked for an error in that case."""


class MisfitError(StreamFP8Error):
    """Checkpoint tensors do not fill their part of a weight, and the user asked for an error in that case."""


class IncompleteLoadError(StreamFP8Error):
    """Loading ended with quantization units that were never completely written."""


class PlaceholderLeakError(StreamFP8Error):
    """Loading ended with a tensor that was computed from a placeholder and therefore holds no data."""
