# SPDX-License-Identifier: Apache-2.0
"""What SGLang's weight updaters can do, where releases differ: found out from SGLang itself, never from its version.

Functions that have moved, or do not exist in some releases, are described by their hooks (``catalogue.py``).
"""

from __future__ import annotations

from typing import Any

import torch


def model_of(updater: Any) -> torch.nn.Module:
    """The model that ``updater``, a ``WeightUpdater`` or a ``ModelRunner``, updates."""
    model: torch.nn.Module = updater.get_model() if hasattr(updater, "get_model") else updater.model
    return model


def has_sessions(updater: Any) -> bool:
    """Whether an update can consist of several calls between a begin and an end."""
    return hasattr(updater, "begin_weight_update")
