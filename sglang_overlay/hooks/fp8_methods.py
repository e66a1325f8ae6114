# SPDX-License-Identifier: Apache-2.0
"""Around ``Fp8LinearMethod`` and ``Fp8MoEMethod`` of SGLang's ``fp8.py``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import Module

from sglang_overlay.load import model_loading
from sglang_overlay.load.model_load import create_streamed, process_streamed
from sglang_overlay.schemes.mxfp8 import Mxfp8ExpertsPlan, Mxfp8LinearPlan
from sglang_overlay.schemes.stock_linear import is_per_channel
from sglang_overlay.schemes.stock_updatable import UpdatableExpertsPlan, UpdatableLinearPlan
from sglang_overlay.schemes.updatable_plan import UpdatablePlan
from sglang_overlay.update import session


def create_linear_weights(original: Callable[..., None], method: Any, layer: Module, *args: Any, **kwargs: Any) -> None:
    """Around ``Fp8LinearMethod.create_weights``."""
    create_streamed(original, lambda: _linear_plan(method), method, layer, *args, **kwargs)


def _linear_plan(method: Any) -> UpdatablePlan:
    return Mxfp8LinearPlan() if method.use_mxfp8 else UpdatableLinearPlan(per_channel=is_per_channel(method))


def create_experts_weights(
    original: Callable[..., None], method: Any, layer: Module, *args: Any, **kwargs: Any
) -> None:
    """Around ``Fp8MoEMethod.create_weights``."""
    plan = Mxfp8ExpertsPlan if method.use_mxfp8 else UpdatableExpertsPlan
    create_streamed(original, plan, method, layer, *args, **kwargs)


def process_weights_after_loading(original: Callable[..., None], method: Any, layer: Module) -> None:
    """Around ``process_weights_after_loading`` of both methods."""
    if not session.is_updating(layer):
        process_streamed(original, method, layer)


def device_loading_context(original: Callable[..., Any], module: Module, target_device: torch.device) -> Any:
    """Around ``device_loading_context``: during an update placeholders are in place, which some releases refuse."""
    if session.is_updating(module):
        return nullcontext(module)
    return model_loading.device_loading_context(original, module, target_device)
