# SPDX-License-Identifier: Apache-2.0
"""Around ``Fp8LinearMethod`` and ``Fp8MoEMethod`` of SGLang's ``fp8.py``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch.nn import Module

from sglang_overlay.load import eligibility
from sglang_overlay.load.model_load import current
from sglang_overlay.schemes.layer_plan import LayerPlan
from sglang_overlay.schemes.mxfp8 import Mxfp8ExpertsPlan, Mxfp8LinearPlan
from sglang_overlay.schemes.stock_experts import ExpertsPlan
from sglang_overlay.schemes.stock_linear import LinearPlan, is_per_channel
from sglang_overlay.update import weight_update


def create_linear_weights(original: Callable[..., None], method: Any, layer: Module, *args: Any, **kwargs: Any) -> None:
    """Around ``Fp8LinearMethod.create_weights``."""
    _create_streamed(original, lambda: _linear_plan(method), method, layer, *args, **kwargs)


def _linear_plan(method: Any) -> LayerPlan:
    return Mxfp8LinearPlan() if method.use_mxfp8 else LinearPlan(per_channel=is_per_channel(method))


def create_experts_weights(
    original: Callable[..., None], method: Any, layer: Module, *args: Any, **kwargs: Any
) -> None:
    """Around ``Fp8MoEMethod.create_weights``."""
    plan = Mxfp8ExpertsPlan if method.use_mxfp8 else ExpertsPlan
    _create_streamed(original, plan, method, layer, *args, **kwargs)


def process_weights_after_loading(original: Callable[..., None], method: Any, layer: Module) -> None:
    """Around ``process_weights_after_loading`` of both methods."""
    if weight_update.is_updating(layer):
        return
    load = current()
    plan = None if load is None else load.finish(layer)
    if load is not None:
        load.note_processing(layer, original, method)
    process = functools.partial(original, method, layer)
    if plan is None:
        process()
    else:
        plan.process(process, method, layer)


def device_loading_context(original: Callable[..., Any], module: Module, target_device: torch.device) -> Any:
    """Around ``device_loading_context``: quantize a layer before it, or anything else of upstream's, looks at it.

    During an update placeholders are in place, which some releases refuse.
    """
    if weight_update.is_updating(module):
        return nullcontext(module)
    load = current()
    if load is not None:
        load.finish(module)
    return original(module, target_device)


def _create_streamed(
    original: Callable[..., None],
    plan: Callable[[], LayerPlan],
    method: Any,
    layer: Module,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Create a layer's weights: as placeholders where it can be streamed."""
    load = current()
    create = functools.partial(original, method, layer, *args, **kwargs)
    if load is None or not load.admits(method.quant_config):
        create()
        return
    reason = eligibility.why_not_layer(method, layer)
    if reason is not None:
        load.leave(layer, reason)
        create()
        return
    dtype = inspect.signature(original).bind(method, layer, *args, **kwargs).arguments["params_dtype"]
    load.create_weights(create, layer, dtype, plan())
