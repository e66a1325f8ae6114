# SPDX-License-Identifier: Apache-2.0
"""Every error this package raises on purpose. Messages name the layer, the parameter and the next step to take."""

from __future__ import annotations


class StreamFP8Error(Exception):
    """Base of all errors raised by sglang-streamfp8."""


def annotate(error: BaseException, note: str) -> None:
    """Add a line to what an error says, whoever raised it."""
    if hasattr(error, "add_note"):
        error.add_note(note)
    else:  # Python 3.10
        error.args = (*error.args, note)


class SettingsError(StreamFP8Error):
    """An environment variable has a value this package does not know."""


class StreamingUnavailableError(StreamFP8Error):
    """``SGLANG_STREAMFP8=require`` was asked for and an fp8 load cannot be streamed."""


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


class SchemeError(SettingsError):
    """The quantization scheme that was asked for does not exist, or not for this model, layer or platform."""


class StagingMemoryError(StreamFP8Error):
    """Memory ran out while a weight was streamed. Caused by torch's own error."""


class NonFiniteWeightError(StreamFP8Error):
    """``SGLANG_STREAMFP8=require`` was asked for and the checkpoint holds NaN or Inf."""


class IncompleteLoadError(StreamFP8Error):
    """Loading ended with quantization units that were never completely written."""


class PlaceholderLeakError(StreamFP8Error):
    """Loading ended with a tensor that was computed from a placeholder and so holds no data."""


class WeightUpdateError(StreamFP8Error):
    """A weight update stopped part of the way, or left units half written."""


class PartialUpdateError(WeightUpdateError):
    """A weight update ended with units of which only a part came."""


class ExportError(StreamFP8Error):
    """A checkpoint cannot be exported, or not to where it was to go."""
