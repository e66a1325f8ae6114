# SPDX-License-Identifier: Apache-2.0
"""Errors of streaming itself. Messages name the layer, the parameter and the next step to take."""

from __future__ import annotations

from collections.abc import Sequence

MAX_LISTED = 8
"""How many names a message lists before it says how many more there are."""


def shortened(names: Sequence[str]) -> str:
    """A list for a message."""
    more = len(names) - MAX_LISTED
    return ", ".join(names[:MAX_LISTED]) + (f" and {more} more" if more > 0 else "")


def sentence(text: object) -> str:
    """Text, an error's say, with the full stop that it may have already."""
    return f"{str(text).rstrip('.')}."


class StreamFP8Error(Exception):
    """Base of all errors that streaming raises."""


def annotate(error: BaseException, note: str) -> None:
    """Add a line to what an error says, whoever raised it."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10
        error.args = (*error.args, note)


class UnsupportedWriteError(StreamFP8Error):
    """A weight loader touched a parameter in a way that cannot be captured; the layer must take stock's path."""


class LayerNotStreamableError(StreamFP8Error):
    """A layer cannot be streamed, and part of it has been quantized already: it must be loaded anew, as in stock.

    Attributes:
        layer: the layer's qualified name.
        reason: what stands against it.
    """

    def __init__(self, parameter: str, reason: str) -> None:
        super().__init__(f"{parameter}: {reason}")
        self.parameter = parameter
        self.layer = parameter.rpartition(".")[0]
        self.reason = reason


class ConflictingWriteError(LayerNotStreamableError):
    """Part of a unit was written again, with other values, after the unit had been quantized."""


class UnsupportedDtypeError(StreamFP8Error):
    """A checkpoint tensor of integers was to be written into a weight: it is quantized already, by something else."""


class UnexpectedParametersError(StreamFP8Error):
    """Upstream created other parameters for a layer than this package knows; the layer must take stock's path."""


class StagingMemoryError(StreamFP8Error):
    """Memory ran out while a weight was streamed. Caused by torch's own error."""


class NonFiniteWeightError(StreamFP8Error):
    """The checkpoint holds NaN or Inf, and the user wants that to be an error."""


class MisfitError(StreamFP8Error):
    """The checkpoint holds tensors that do not fill their part of a weight, and the user wants that to be an error."""


class IncompleteLoadError(StreamFP8Error):
    """Loading ended with quantization units that were never completely written."""


class PlaceholderLeakError(StreamFP8Error):
    """Loading ended with a tensor that was computed from a placeholder and so holds no data."""
