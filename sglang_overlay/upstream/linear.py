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

from sglang_overlay.core.quantizers import RowKernelQuantizer, UnitQuantizer, WholeUnitQuantizer
from sglang_overlay.core.stream import Storage
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.upstream.load import create_streamed, process_streamed
from sglang_overlay.upstream.plan import OnlinePlan, ParameterPlan


class LinearPlan(OnlinePlan):
    """Streams ``weight``, ``[N, K]``, as stock quantizes it per channel or per tensor."""

    weights = frozenset({"weight"})

    def __init__(self, *, per_channel: bool) -> None:
        self._per_channel = per_channel

    def allocate(self, name: str, placeholder: torch.Tensor, device: torch.device) -> Storage:
        from sglang.srt.layers.quantization import fp8

        weight = torch.empty(placeholder.shape, dtype=fp8.fp8_dtype, device=device)
        return self._storage(weight, torch.empty(self._scales(placeholder), dtype=torch.float32, device=device))

    def parameter(self, name: str, placeholder: torch.Tensor, storage: Storage) -> ParameterPlan:
        rows, columns = placeholder.shape
        grid = UnitGrid.per_slice((rows, columns)) if self._per_channel else UnitGrid.one((rows, columns))
        return ParameterPlan(grid, self.quantizer(storage.weight.device, rows), storage)

    def quantizer(self, device: torch.device, rows: int) -> UnitQuantizer:
        """What turns rows of a weight that has ``rows``, or all of it, into fp8: upstream's own functions."""
        from sglang.srt.layers.quantization import fp8

        if self._per_channel:
            return RowKernelQuantizer(fp8.per_token_group_quant_fp8, rows)
        return WholeUnitQuantizer(fp8.input_to_float8)

    def register(self, layer: Module, storages: Mapping[str, Storage]) -> None:
        storage = storages["weight"]
        rows, columns = storage.weight.shape[-2:]
        # Per channel with the strides (1, 1) of stock's ``x_s.t().contiguous()``, which leaves one row as it is.
        scale = storage.scale.view(rows, 1).t() if self._per_channel else storage.scale.view(())
        layer.weight = Parameter(storage.weight.view(rows, columns).t(), requires_grad=False)
        layer.weight_scale = Parameter(scale, requires_grad=False)
        layer.input_scale = None  # type: ignore[assignment]

    def process(self, original: Callable[[], None], method: Any, layer: Module) -> None:
        if method.use_marlin:
            from sglang.srt.layers.quantization.fp8 import prepare_fp8_layer_for_marlin

            prepare_fp8_layer_for_marlin(layer, not method.block_quant)
            del layer.input_scale

    def _scales(self, placeholder: torch.Tensor) -> int:
        return placeholder.shape[0] if self._per_channel else 1

    def _storage(self, weight: torch.Tensor, scale: torch.Tensor) -> Storage:
        return Storage(weight if self._per_channel else weight.unsqueeze(0), scale)


def is_per_channel(method: Any) -> bool:
    """Whether stock would quantize the weight of an ``Fp8LinearMethod`` per channel."""
    return bool(method.cutlass_fp8_supported or method.use_marlin)


def create_weights(original: Callable[..., None], method: Any, layer: Module, *args: Any, **kwargs: Any) -> None:
    """Around ``Fp8LinearMethod.create_weights``."""
    create_streamed(original, lambda: LinearPlan(per_channel=is_per_channel(method)), method, layer, *args, **kwargs)


def process_weights_after_loading(original: Callable[..., None], method: Any, layer: Module) -> None:
    """Around ``Fp8LinearMethod.process_weights_after_loading``."""
    process_streamed(original, method, layer)
