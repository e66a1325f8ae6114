# SPDX-License-Identifier: Apache-2.0
"""``tensor`` and ``channel``: the user chooses the granularity that stock SGLang chooses by platform."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.quantization import fp8
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsFusedMoEMethod,
)
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Fp8MoE
from sglang.srt.utils import is_hip

from sglang_overlay.core.quantizers import RowKernelQuantizer, UnitQuantizer
from sglang_overlay.schemes.arithmetic import row_quantizer
from sglang_overlay.schemes.expert_rows import ExpertRowsPlan
from sglang_overlay.schemes.layer_plan import LayerPlan
from sglang_overlay.schemes.rows_over_ranks import WholeRowScales
from sglang_overlay.schemes.scheme import LayerKind
from sglang_overlay.schemes.stock_experts import ExpertsPlan
from sglang_overlay.schemes.stock_linear import LinearPlan
from sglang_overlay.schemes.stored_format import StoredFormat


class ChosenFp8Config(fp8.Fp8Config):  # type: ignore[misc]
    """SGLang's own config for layers whose granularity the user chose; the hooks for stock's choice ignore it."""


class ChosenLinearPlan(LinearPlan):
    """The user chooses the granularity, also for layers that cannot be streamed."""

    replaces_stock = True


class ChannelLinearPlan(WholeRowScales, ChosenLinearPlan):
    """One scale per output channel, the same at any tensor parallel size."""

    def whole_columns(self, layer: torch.nn.Module, name: str, columns: int) -> int:
        return int(layer.input_size)  # type: ignore[arg-type]


class TensorScheme:
    """One scale for each weight; an expert has one for w13 and one for w2."""

    summary = "fp8, one scale a weight (for experts, one for w13 and one for w2 of each)"

    def why_not(self, kind: LayerKind) -> str | None:
        return None

    def method(self, kind: LayerKind, layer: torch.nn.Module, name: str) -> Any:
        config = ChosenFp8Config()
        return fp8.Fp8LinearMethod(config) if kind is LayerKind.LINEAR else fp8.Fp8MoEMethod(config)

    def plan(self, kind: LayerKind, method: Any) -> LayerPlan:
        return ChosenLinearPlan(per_channel=False) if kind is LayerKind.LINEAR else ExpertsPlan()

    def stored(self) -> StoredFormat | None:
        # On loading such a checkpoint, stock quantizes the parts of a fused layer again, from values already rounded.
        return None


class ChannelScheme:
    """One scale for each output channel, that is each row of a weight; activations get one per token."""

    summary = "fp8, one scale an output channel"

    def why_not(self, kind: LayerKind) -> str | None:
        if is_hip():
            return f"on ROCm it is SGLang's own choice for linear layers, with {AITER_PER_TOKEN}"
        return None

    def method(self, kind: LayerKind, layer: torch.nn.Module, name: str) -> Any:
        if kind is LayerKind.LINEAR:
            return fp8.Fp8LinearMethod(ChosenFp8Config())
        config = CompressedTensorsConfig.from_config({**STORED, "ignore": []})
        form = config.target_scheme_map["Linear"]
        layer.scheme = ChannelExperts(form["weights"], form["input_activations"])
        return CompressedTensorsFusedMoEMethod(config)

    def plan(self, kind: LayerKind, method: Any) -> LayerPlan:
        return ChannelLinearPlan(per_channel=True) if kind is LayerKind.LINEAR else ChannelExpertsPlan()

    def stored(self) -> StoredFormat | None:
        """In compressed-tensors' format, as in llm-compressor's FP8_DYNAMIC checkpoints."""
        return StoredFormat(
            config=STORED,
            ignored="ignore",
            scale="_scale",
            scale_shape=lambda shape: (shape[0], 1),
            quantizer=row_quantizer(),
            rows=1,
            same_as=SAME_AS,
        )


class ChannelExperts(CompressedTensorsW8A8Fp8MoE):  # type: ignore[misc]
    """SGLang's own scheme, corrected for experts without a gate: it makes w13 for two projections, they have one."""

    def create_weights(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        if layer.moe_runner_config.is_gated:  # type: ignore[union-attr]
            return
        for name in ("w13_weight", "w13_weight_scale"):
            parameter = layer.get_parameter(name)
            experts, rows, columns = parameter.shape
            # Release the memory first: there may not be enough for both.
            parameter.data = parameter.data.new_empty(0)
            parameter.data = parameter.data.new_ones(experts, rows // 2, columns)


class ChannelExpertsPlan(ExpertRowsPlan):
    """Experts as from a checkpoint in compressed-tensors' format with channel-wise scales."""

    def quantizer(self) -> UnitQuantizer:
        return ZeroedRowKernelQuantizer(fp8.per_token_group_quant_fp8, 0)


class ZeroedRowKernelQuantizer(RowKernelQuantizer):
    """Quantizes rows with upstream's kernel, but always stores zeros in rows with scale 0.

    There the kernel stores 0 or 448, depending on the number of rows, which is not fixed for experts: an export
    quantizes each expert alone, a checkpoint may bring all of them at once. The export stores zeros too.
    """

    def _quantize_rows(self, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
        super()._quantize_rows(rows, weight, scale)
        weight.view(torch.uint8).masked_fill_(scale.view(-1, 1) == 0, 0)


SAME_AS = (
    "at any tensor parallel size: scales are of whole rows. Only a row-parallel layer (o_proj, down_proj, experts' w2) "
    "that is loaded whole before it is quantized, or whose weight loader is given some columns of a tensor, differs at "
    "sizes above 1; such a load names it"
)
_CHANNEL = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
_TOKEN = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
STORED = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _CHANNEL, "input_activations": _TOKEN}},
    "quantization_status": "compressed",
}
"""The ``quantization_config`` of a checkpoint with channel-wise scales."""

AITER_PER_TOKEN = "SGLANG_USE_AITER=1 and SGLANG_USE_AITER_FP8_PER_TOKEN=1"

TENSOR = TensorScheme()
CHANNEL = ChannelScheme()
