# SPDX-License-Identifier: Apache-2.0
"""Expert layers: ``Fp8MoEMethod`` of SGLang's ``fp8.py``.

Stock quantizes each expert's w13 ``[2 * intermediate, hidden]`` and w2 ``[hidden, intermediate]`` per tensor
(``scaled_fp8_quant``); scales are ``[E]``. On ROCm upstream then shuffles or pads the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Module, Parameter

from sglang_overlay.core.placeholders import twin
from sglang_overlay.core.quantizers import ShuffledUnits, UnitQuantizer, WholeUnitQuantizer
from sglang_overlay.core.stream import Storage
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.schemes import capabilities
from sglang_overlay.schemes.layer_plan import OnlinePlan, ParameterPlan


class ExpertsPlan(OnlinePlan):
    """Streams ``w13_weight`` and ``w2_weight``; each expert's matrix is a unit."""

    weights = frozenset({"w13_weight", "w2_weight"})

    def __init__(self) -> None:
        self._row_scales: dict[str, torch.Tensor] = {}

    def allocate(self, name: str, placeholder: torch.Tensor, device: torch.device) -> Storage:
        from sglang.srt.layers.quantization import fp8

        weight = torch.empty(placeholder.shape, dtype=fp8.fp8_dtype, device=device)
        return Storage(weight, torch.ones(placeholder.shape[0], dtype=torch.float32, device=device))

    def parameter(self, name: str, placeholder: torch.Tensor, storage: Storage) -> ParameterPlan:
        quantizer = self.quantizer()
        if name in self._row_scales:
            quantizer = AiterExperts(quantizer, self._row_scales[name])
        return ParameterPlan(UnitGrid.per_slice(placeholder.shape), quantizer, storage)

    def quantizer(self) -> UnitQuantizer:
        """Turns one expert's matrix into fp8, with upstream's own function."""
        from sglang.srt.layers.quantization import fp8

        return WholeUnitQuantizer(fp8.scaled_fp8_quant)

    def register(self, layer: Module, storages: Mapping[str, Storage]) -> None:
        w13, w2 = storages["w13_weight"], storages["w2_weight"]
        layer.w13_weight_scale = Parameter(w13.scale, requires_grad=False)
        # In place, as in stock: expert rebalancing uses references that a model has taken.
        layer.get_parameter("w2_weight_scale").data.copy_(w2.scale)
        layer.w13_weight = Parameter(w13.weight, requires_grad=False)
        layer.w2_weight = Parameter(w2.weight, requires_grad=False)

    def process(self, original: Callable[[], None], method: Any, layer: Module) -> None:
        from sglang.srt.utils import is_hip

        if is_hip():
            method.process_weights_hip_scale_padding(layer)
        _prepare_backend(method, layer)
        dispatcher: Any = getattr(layer, "dispatcher", None)
        if dispatcher is not None:
            kernel = getattr(layer, "w13_kernel", None)
            wanted = getattr(kernel, "DISPATCHER_QUANT_CONFIG", None)
            # In releases that do not pass use_mxfp8 on themselves, dispatchers ignore it.
            found = {"weight_dtype": layer.w13_weight.dtype, "use_mxfp8": method.use_mxfp8}
            dispatcher.set_quant_config(found if wanted is None else wanted)

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


def _prepare_backend(method: Any, layer: Module) -> None:
    from sglang.srt.layers.moe.utils import get_moe_runner_backend

    backend = get_moe_runner_backend()
    if capabilities.takes_activation_params(method, backend):
        method._prepare_flashinfer_trtllm_activation_params(layer)
    if capabilities.takes_hpc_ops_weights(backend):
        method._prepare_hpc_ops_weights(layer)
