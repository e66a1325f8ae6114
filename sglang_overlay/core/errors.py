# SPDX-License-Identifier: Apache-2.0
"""Errors of a stream. Messages name the parameter."""

from __future__ import annotations


class StreamFP8Error(Exception):
    """Base of all errors that streaming raises."""


class UnsupportedWriteError(StreamFP8Error):
    """A weight loader touched a parameter in a way that cannot be captured."""


class LayerNotStreamableError(StreamFP8Error):
    """A layer cannot be streamed, and part of it is quantized already: it must be loaded again, without streaming.

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
    """Part of a unit was written again after the unit had been quantized."""


class UnsupportedDtypeError(StreamFP8Error):
    """A loader tried to write an integer tensor into a weight: the checkpoint is already quantized some other way."""
