"""Weights that a streamed checkpoint lacks. Without streaming they would be left uninitialized without a word."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang.srt.environ import envs
from sglang.srt.layers.quantization.streaming_fp8.errors import StreamFP8Error

logger = logging.getLogger(__name__)

MOST_LISTED = 8


class MissingWeightsError(StreamFP8Error):
    """The checkpoint lacks weights of the model."""


@dataclass(frozen=True)
class MissingUnits:
    """Units of a parameter that were never completely loaded: experts, or all of a linear layer's weight."""

    parameter: str
    units: Sequence[int]
    count: int

    def __str__(self) -> str:
        if self.count == 1:
            return self.parameter
        listed = ", ".join(map(str, self.units[:MOST_LISTED]))
        more = ", ..." if len(self.units) > MOST_LISTED else ""
        return f"{self.parameter} ({len(self.units)} of {self.count} experts: {listed}{more})"


def has_unused_rows(model: torch.nn.Module, parameter: str) -> bool:
    """Whether a parameter is of an attention that takes keys and values from another layer.

    Its rows for them are not used, and checkpoints may lack them (``gemma3n_causal.py``, ``gemma4_causal.py`` with
    ``num_kv_shared_layers``, and Gemma 4's drafts, ``gemma4_mtp.py``).
    """
    attention = model.get_submodule(parameter.rsplit(".", 2)[0])
    return getattr(attention, "is_kv_shared_layer", False) or hasattr(model, "bind_frozen_kv_context")


def report_missing(missing: Sequence[MissingUnits]) -> None:
    """Raise an error that names what is missing, or warn if zeros are to be served there."""
    if not missing:
        return
    names = ", ".join(map(str, missing[:MOST_LISTED]))
    more = f" and {len(missing) - MOST_LISTED} more" if len(missing) > MOST_LISTED else ""
    text = f"The checkpoint does not hold all of {names}{more}."
    if not envs.SGLANG_STREAMFP8_ALLOW_MISSING.get():
        raise MissingWeightsError(f"{text} Set SGLANG_STREAMFP8_ALLOW_MISSING=1 to serve zeros there.")
    logger.warning("%s Zeros are served there.", text)
