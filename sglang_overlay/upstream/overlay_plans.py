# SPDX-License-Identifier: Apache-2.0
"""Stock's linear layers and experts with what the overlay adds: quantizing on the CPU, and weight updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Module, Parameter

from sglang_overlay.core.cpu_quantizers import KernelArithmetic, PerTensorQuantizer, RatioArithmetic, quantize_rows
from sglang_overlay.core.quantizers import RowQuantizer, UnitQuantizer
from sglang_overlay.core.stream import Storage
from sglang_overlay.schemes.mxfp8 import Mxfp8ExpertsPlan, Mxfp8LinearPlan
from sglang_overlay.upstream import update
from sglang_overlay.upstream.linear import LinearPlan, is_per_channel
from sglang_overlay.upstream.load import create_streamed, process_streamed
from sglang_overlay.upstream.moe import ExpertsPlan
from sglang_overlay.upstream.updatable_plan import UpdatablePlan


class UpdatableLinearPlan(LinearPlan, UpdatablePlan):
    """``LinearPlan`` of a layer that may be updated."""

    def quantizer(self, device: torch.device, rows: int) -> UnitQuantizer:
        from sglang.srt.layers.quantization import fp8

        if device.type != "cpu":
            return super().quantizer(device, rows)
        if self._per_channel:
            return RowQuantizer(lambda values: quantize_rows(values, fp8.fp8_dtype))
        return PerTensorQuantizer(RatioArithmetic(torch.finfo(fp8.fp8_dtype).max))

    def registered(self, layer: Module, placeholders: Mapping[str, Parameter]) -> dict[str, Storage] | None:
        from sglang.srt.layers.quantization import fp8

        weight, scale = layer.get_parameter("weight").data.t(), layer.get_parameter("weight_scale").data
        placeholder = placeholders["weight"]
        if (weight.dtype, weight.shape) != (fp8.fp8_dtype, placeholder.shape) or not weight.is_contiguous():
            return None
        return {"weight": self._storage(weight, scale.view(-1))} if scale.numel() == self._scales(placeholder) else None


class UpdatableExpertsPlan(ExpertsPlan, UpdatablePlan):
    """``ExpertsPlan`` of a layer that may be updated."""

    def quantizer(self, device: torch.device) -> UnitQuantizer:
        from sglang.srt.layers.quantization import fp8

        if device.type != "cpu":
            return super().quantizer(device)
        return PerTensorQuantizer(KernelArithmetic(torch.finfo(fp8.fp8_dtype).max))

    def registered(self, layer: Module, placeholders: Mapping[str, Parameter]) -> dict[str, Storage] | None:
        from sglang.srt.layers.quantization import fp8

        storages = {
            name: Storage(getattr(layer, name).data, getattr(layer, f"{name}_scale").data) for name in placeholders
        }
        for name, storage in storages.items():
            shape = placeholders[name].shape
            if (storage.weight.dtype, storage.weight.shape, storage.scale.shape) != (fp8.fp8_dtype, shape, shape[:1]):
                return None
        return storages


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
    if not update.is_updating(layer):
        process_streamed(original, method, layer)
