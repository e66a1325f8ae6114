# SPDX-License-Identifier: Apache-2.0
"""Stock's linear layers and experts as the overlay loads them: the plans of ``stock_*.py``, made updatable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.nn import Module, Parameter

from sglang_overlay.core.placeholders import twin
from sglang_overlay.core.quantizers import ShuffledUnits, UnitQuantizer
from sglang_overlay.core.stream import Storage
from sglang_overlay.schemes import capabilities
from sglang_overlay.schemes.layer_plan import ParameterPlan
from sglang_overlay.schemes.stock_experts import ExpertsPlan
from sglang_overlay.schemes.stock_linear import LinearPlan
from sglang_overlay.schemes.updatable_plan import UpdatablePlan


class UpdatableLinearPlan(LinearPlan, UpdatablePlan):
    """The plan of every streamed linear layer of stock's; the patch series uses ``LinearPlan`` alone."""

    def registered(self, layer: Module, placeholders: Mapping[str, Parameter]) -> dict[str, Storage] | None:
        from sglang.srt.layers.quantization import fp8

        weight, scale = layer.get_parameter("weight").data.t(), layer.get_parameter("weight_scale").data
        placeholder = placeholders["weight"]
        if (weight.dtype, weight.shape) != (fp8.fp8_dtype, placeholder.shape) or not weight.is_contiguous():
            return None
        return {"weight": self._storage(weight, scale.view(-1))} if scale.numel() == self._scales(placeholder) else None

    def scale_placeholders(
        self, layer: Module, placeholders: Mapping[str, Parameter]
    ) -> dict[str, tuple[str, Parameter]]:
        """``weight_scale``, as in checkpoints in compressed-tensors' format.

        Float32: per channel ``[N, 1]``; per tensor one scale for each checkpoint tensor of a fused weight.
        """
        from sglang.srt.layers.parameter import ChannelQuantScaleParameter, PerTensorScaleParameter

        weight: Any = placeholders["weight"]
        # aiter serves shuffled rows.
        if capabilities.uses_aiter() or getattr(weight, "output_dim", None) != 0:
            return {}
        if self._per_channel:
            made = torch.empty(len(weight), 1, dtype=torch.float32, device="meta")
            scale = ChannelQuantScaleParameter(data=made, output_dim=0, weight_loader=weight.weight_loader)
        else:
            parts: Any = layer.logical_widths
            made = torch.empty(len(parts), dtype=torch.float32, device="meta")
            scale = PerTensorScaleParameter(data=made, weight_loader=weight.weight_loader)
        return {"weight": ("weight_scale", scale)}


class UpdatableExpertsPlan(ExpertsPlan, UpdatablePlan):
    """The plan of every streamed expert layer of stock's; the patch series uses ``ExpertsPlan`` alone."""

    def __init__(self) -> None:
        self._row_scales: dict[str, torch.Tensor] = {}

    def parameter(self, name: str, placeholder: torch.Tensor, storage: Storage) -> ParameterPlan:
        plan = super().parameter(name, placeholder, storage)
        if name not in self._row_scales:
            return plan
        return replace(plan, quantizer=AiterExperts(plan.quantizer, self._row_scales[name]))

    def registered(self, layer: Module, placeholders: Mapping[str, Parameter]) -> dict[str, Storage] | None:
        from sglang.srt.layers.quantization import fp8

        storages = {name: _served(layer, name, tuple(placeholders[name].shape)) for name in placeholders}
        for name, storage in storages.items():
            shape = placeholders[name].shape
            if (storage.weight.dtype, storage.weight.shape, storage.scale.shape) != (fp8.fp8_dtype, shape, shape[:1]):
                return None
        if capabilities.uses_aiter():
            # Exists only in a finished layer: upstream shuffles experts when all have been loaded.
            self._row_scales = {name: layer.get_parameter(f"{name}_scale1").data for name in placeholders}
        return storages

    def scale_placeholders(
        self, layer: Module, placeholders: Mapping[str, Parameter]
    ) -> dict[str, tuple[str, Parameter]]:
        """As in checkpoints with one scale per tensor: ``[E, 2]`` for gate and up, ``[E]`` for down."""
        from sglang.srt.layers.moe.fused_moe_triton import FusedMoeWeightScaleSupported

        if capabilities.uses_aiter():
            return {}
        made = {}
        for name, weight in placeholders.items():
            scale = layer.get_parameter(f"{name}_scale")
            stand_in: Any = twin(scale, torch.empty_like(scale, device="meta"))
            stand_in.quant_method = FusedMoeWeightScaleSupported.TENSOR.value
            stand_in.weight_loader = weight.weight_loader  # type: ignore[attr-defined]
            made[name] = f"{name}_scale", stand_in
        return made


class AiterExperts(ShuffledUnits):
    """Quantizes experts that aiter serves: shuffles them, and repeats each expert's scale for each of its rows.

    Args:
        quantizer: quantizes an expert's matrix.
        row_scales: float32 ``[experts, rows]``.
    """

    def __init__(self, quantizer: UnitQuantizer, row_scales: torch.Tensor) -> None:
        super().__init__(quantizer, capabilities.shuffle, capabilities.unshuffle)
        self._row_scales = row_scales

    def quantize_units(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        found = super().quantize_units(values, weight, scale)
        # A layer's scales are one tensor with one element per expert, so the offset is the first expert's number.
        first = scale.storage_offset()
        self._row_scales[first : first + len(scale)] = scale.view(-1, 1)
        return found


def _served(layer: Module, name: str, shape: tuple[int, ...]) -> Storage:
    """A finished layer's weight and scales, without the columns that upstream adds with SGLANG_MOE_PADDING."""
    weight = layer.get_parameter(name).data
    return Storage(weight[..., : shape[-1]], layer.get_parameter(f"{name}_scale").data)
