# SPDX-License-Identifier: Apache-2.0
"""Every error this package raises on purpose. Messages name the layer, the parameter and the next step to take."""

from __future__ import annotations

from sglang_overlay.core.errors import (
    ConflictingWriteError,
    LayerNotStreamableError,
    StreamFP8Error,
    UnsupportedDtypeError,
    UnsupportedWriteError,
)
from sglang_overlay.core.load_errors import (
    IncompleteLoadError,
    MisfitError,
    NonFiniteWeightError,
    PlaceholderLeakError,
    StagingMemoryError,
    UnexpectedParametersError,
)

__all__ = [
    "ConflictingWriteError",
    "DumpError",
    "ExportError",
    "IncompleteLoadError",
    "LayerNotStreamableError",
    "MisfitError",
    "NonFiniteWeightError",
    "PartialUpdateError",
    "PlaceholderLeakError",
    "QuantizeError",
    "SchemeError",
    "SettingsError",
    "StagingMemoryError",
    "StreamFP8Error",
    "StreamingUnavailableError",
    "UnexpectedParametersError",
    "UnsupportedDtypeError",
    "UnsupportedWriteError",
    "WeightUpdateError",
]


class SettingsError(StreamFP8Error):
    """A setting has a name or value this package does not know, or contradicts another."""


class StreamingUnavailableError(StreamFP8Error):
    """An fp8 load, or a layer of it, cannot be streamed, but ``SGLANG_STREAMFP8=require`` or a scheme requires it."""


class SchemeError(SettingsError):
    """The chosen quantization scheme does not exist, or is not available for this model, layer or platform."""


class DumpError(StreamFP8Error):
    """A dump of ``--load-format presharded`` does not fit what is being started."""


class WeightUpdateError(StreamFP8Error):
    """A weight update failed, or was given values that it cannot take."""


class PartialUpdateError(WeightUpdateError):
    """A weight update ended with units of which only a part was sent."""


class ExportError(StreamFP8Error):
    """A checkpoint cannot be exported, or not to the given folder."""


class QuantizeError(StreamFP8Error):
    """``sglang_overlay.quantize`` cannot tell from its arguments what a server makes of them."""
