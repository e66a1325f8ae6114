# SPDX-License-Identifier: Apache-2.0
"""What SGLang's weight updaters can do, where supported releases differ: asked of SGLang itself, never of its version.

That a function has moved, or is not there at all, is said by its hook (``catalogue.py``) instead.
"""

from __future__ import annotations

from typing import Any

import torch


def model_of(updater: Any) -> torch.nn.Module:
    """The model whose weights are updated: by a ``WeightUpdater``, or by the ``ModelRunner`` itself."""
    model: torch.nn.Module = updater.get_model() if hasattr(updater, "get_model") else updater.model
    return model


def has_sessions(updater: Any) -> bool:
    """Whether an update may come in several calls, between a begin and an end."""
    return hasattr(updater, "begin_weight_update")
