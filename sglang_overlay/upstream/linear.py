# SPDX-License-Identifier: Apache-2.0
"""Linear layers: ``Fp8LinearMethod`` of SGLang's ``fp8.py``.

Stock quantizes a bf16 weight ``[N, K]`` per channel where the kernels want that (cutlass fp8, marlin:
``per_token_group_quant_fp8(weight, K)``) and per tensor otherwise (``input_to_float8``), and keeps the transposed view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Module, Parameter

from sglang_overlay.core.quantizers import (
    PerTensorQuantizer,
    RatioArithmetic,
    RowQuantizer,
    UnitQuantizer,
    WholeUnitQuantizer,
    quantize_rows,
)
from sglang_overlay.core.stream import Storage
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.upstream.load import create_streamed, process_streamed
from sglang_overlay.upstream.plan import OnlinePlan, ParameterPlan


class LinearPlan(OnlinePlan):
    """Streams ``weight``, ``[N, K]``, as stock quantizes it per channel or per tensor."""

    weights = frozenset({"weight"})

    def __init__(self, *, per_channel: bool) -> None:
        self._per_channel = per_channel

    @classmethod
    def stock(cls, method: Any) -> LinearPlan:
        """As stock would choose for an ``Fp8LinearMethod``."""
        return cls(per_channel=method.cutlass_fp8_supported or method.use_marlin)

    def allocate(self, name: str, placeholder: torch.Tensor, device: torch.device) -> Storage:
        from sglang.srt.layers.quantization import fp8

        weight = torch.empty(placeholder.shape, dtype=fp8.fp8_dtype, device=device)
        return self._storage(weight, torch.empty(self._scales(placeholder), dtype=torch.float32, device=device))

    def parameter(self, name: str, placeholder: torch.Tensor, storage: Storage) -> ParameterPlan:

        rows, columns = placeholder.shape
        if self._per_channel:
            return ParameterPlan(UnitGrid.per_slice((rows, columns)), row_quantizer(storage.weight.device), storage)
        return ParameterPlan(UnitGrid.one((rows, columns)), _quantizer(storage.weight.device), storage)

    def register(self, layer: Module, storages: Mapping[str, Storage]) -> None:
        storage = storages["weight"]
        rows, columns = storage.weight.shape[-2:]
        scale = storage.scale.view(1, rows) if self._per_channel else storage.scale.view(())
        layer.weight = Parameter(storage.weight.view(rows, columns).t(), requires_grad=False)
        layer.weight_scale = Parameter(scale, requires_grad=False)
        layer.input_scale = None  # type: ignore[assignment]

    def process(self, original: Callable[[], None], method: Any, layer: Module) -> None:
        if method.use_marlin:
            from sglang.srt.layers.quantization.fp8 import prepare_fp8_layer_for_marlin

            prepare_fp8_layer_for_marlin(layer, not method.block_quant)
            del layer.input_scale

    def registered(self, layer: Module, placeholders: Mapping[str, Parameter]) -> dict[str, Storage] | None:
        from sglang.srt.layers.quantization import fp8

        weight, scale = layer.get_parameter("weight").data.t(), layer.get_parameter("weight_scale").data
        placeholder = placeholders["weight"]
        if (weight.dtype, weight.shape) != (fp8.fp8_dtype, placeholder.shape) or not weight.is_contiguous():
            return None
        return {"weight": self._storage(weight, scale.view(-1))} if scale.numel() == self._scales(placeholder) else None

    def _scales(self, placeholder: torch.Tensor) -> int:
        return placeholder.shape[0] if self._per_channel else 1

    def _storage(self, weight: torch.Tensor, scale: torch.Tensor) -> Storage:
        return Storage(weight if self._per_channel else weight.unsqueeze(0), scale)


def row_quantizer(device: torch.device) -> UnitQuantizer:
    """Per-channel, by upstream's kernel where there is a device for it."""
    from sglang.srt.layers.quantization import fp8

    if device.type == "cpu":
        return RowQuantizer(lambda values: quantize_rows(values, fp8.fp8_dtype))
    return RowQuantizer(lambda values: fp8.per_token_group_quant_fp8(values, values.shape[-1]))


def _quantizer(device: torch.device) -> UnitQuantizer:
    from sglang.srt.layers.quantization import fp8

    if device.type == "cpu":
        return PerTensorQuantizer(RatioArithmetic(torch.finfo(fp8.fp8_dtype).max))
    return WholeUnitQuantizer(fp8.input_to_float8)


def create_weights(original: Callable[..., None], method: Any, layer: Module, *args: Any, **kwargs: Any) -> None:
    """Around ``Fp8LinearMethod.create_weights``."""
    create_streamed(original, lambda: LinearPlan.stock(method), method, layer, *args, **kwargs)


def process_weights_after_loading(original: Callable[..., None], method: Any, layer: Module) -> None:
    """Around ``Fp8LinearMethod.process_weights_after_loading``."""
    process_streamed(original, method, layer)
