# SPDX-License-Identifier: Apache-2.0
"""Errors of a load. Messages name the layer, the parameter and the next step to take."""

from __future__ import annotations

from sglang_overlay.core.errors import StreamFP8Error


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
