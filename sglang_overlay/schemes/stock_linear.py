# SPDX-License-Identifier: Apache-2.0
"""Linear layers: ``Fp8LinearMethod`` of SGLang's ``fp8.py``.

Stock quantizes a bf16 weight ``[N, K]`` per channel if the kernel needs that (cutlass fp8, marlin, aiter per token:
``per_token_group_quant_fp8(weight, K)``) and per tensor otherwise (``input_to_float8``), and keeps the transposed view.
aiter's per-token kernel needs the rows shuffled in groups of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Module, Parameter

from sglang_overlay.core.quantizers import RowKernelQuantizer, ShuffledUnits, UnitQuantizer, WholeUnitQuantizer
from sglang_overlay.core.stream import Storage
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.schemes import capabilities
from sglang_overlay.schemes.layer_plan import OnlinePlan, ParameterPlan


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
        if self._per_channel and capabilities.runs_shuffled_rows(rows):
            # Triton has one kernel for any number of rows, hence 0.
            return _shuffled(self.quantizer(0), placeholder, storage)
        grid = UnitGrid.per_slice((rows, columns)) if self._per_channel else UnitGrid.one((rows, columns))
        return ParameterPlan(grid, self.quantizer(rows), storage)

    def quantizer(self, rows: int) -> UnitQuantizer:
        """Turns rows of a weight with ``rows`` rows, or the whole weight, into fp8 with upstream's own functions."""
        from sglang.srt.layers.quantization import fp8

        if self._per_channel:
            return RowKernelQuantizer(fp8.per_token_group_quant_fp8, rows)
        return WholeUnitQuantizer(fp8.input_to_float8)

    def register(self, layer: Module, storages: Mapping[str, Storage]) -> None:
        storage = storages["weight"]
        # Per channel: strides (1, 1), as of stock's ``x_s.t().contiguous()``, which does not copy a single row.
        scale = storage.scale.view(-1, 1).t() if self._per_channel else storage.scale.view(())
        layer.weight = Parameter(storage.weight.view(-1, storage.weight.shape[-1]).t(), requires_grad=False)
        layer.weight_scale = Parameter(scale, requires_grad=False)
        layer.input_scale = None  # type: ignore[assignment]

    def process(self, original: Callable[[], None], method: Any, layer: Module) -> None:
        if method.use_marlin:
            from sglang.srt.layers.quantization.fp8 import prepare_fp8_layer_for_marlin

            prepare_fp8_layer_for_marlin(layer, not method.block_quant)
            del layer.input_scale
        if self._per_channel and is_per_token(method):
            method.use_per_token_if_dynamic = True

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

    def _scales(self, placeholder: torch.Tensor) -> int:
        return placeholder.shape[0] if self._per_channel else 1

    def _storage(self, weight: torch.Tensor, scale: torch.Tensor) -> Storage:
        return Storage(weight if self._per_channel else weight.unsqueeze(0), scale)


def is_per_channel(method: Any) -> bool:
    """Whether stock would quantize the weight of an ``Fp8LinearMethod`` per channel."""
    return bool(method.cutlass_fp8_supported or method.use_marlin or is_per_token(method))


def is_per_token(method: Any) -> bool:
    """Whether aiter runs layers of an ``Fp8LinearMethod`` with one scale per token and one per output channel."""
    return bool(method.use_aiter_fp8_per_token and capabilities.uses_aiter())


def _shuffled(quantizer: UnitQuantizer, placeholder: torch.Tensor, storage: Storage) -> ParameterPlan:
    """A plan whose units are the groups of rows that are shuffled together. aiter refuses heights with a remainder."""
    rows, columns = placeholder.shape
    height = rows if rows % capabilities.SHUFFLED_ROWS else capabilities.SHUFFLED_ROWS
    grid = UnitGrid(rows // height, (height, columns), sliced=True)
    storage = Storage(storage.weight.view(grid.parameter_shape), storage.scale.view(grid.count, height))
    return ParameterPlan(grid, ShuffledUnits(quantizer, capabilities.shuffle, capabilities.unshuffle), storage)
