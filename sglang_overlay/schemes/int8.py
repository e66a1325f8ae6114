# SPDX-License-Identifier: Apache-2.0
"""``int8``: experts with int8 weights and one scale per output channel; activations stay in the model's dtype.

SGLang's fused MoE kernel takes such weights (``use_int8_w8a16``), but no quantization method of SGLang's makes them:
its own int8 methods quantize activations as well (``w8a8_int8``) or weights in groups (``moe_wna16``). vLLM plans one
loader for fp8 and int8 experts (vllm-project/vllm#33178); here the loader is the same, and this file is the scheme.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from sglang.srt.layers.moe.fused_moe_triton import FusedMoeWeightScaleSupported
from sglang.srt.layers.moe.moe_runner import MoeRunner
from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo
from sglang.srt.layers.moe.utils import MoeRunnerBackend, get_moe_runner_backend
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase
from sglang.srt.utils import is_hip, set_weight_attrs

from sglang_overlay.core.quantizers import AssembledUnits, UnitQuantizer
from sglang_overlay.core.regions import slices
from sglang_overlay.core.staging import Piece
from sglang_overlay.schemes.arithmetic import CHUNK_ELEMENTS
from sglang_overlay.schemes.expert_rows import ExpertRowsPlan
from sglang_overlay.schemes.layer_plan import LayerPlan
from sglang_overlay.schemes.scheme import LayerKind
from sglang_overlay.schemes.stored_format import StoredFormat

INT8_MAX = 127
"""The range is symmetric: -128 is not used."""


class Int8Scheme:
    """Experts only: SGLang has no linear kernel for int8 weights with bf16 activations."""

    summary = "int8 weights, one scale an output channel, activations in bf16 (experts only)"

    def why_not(self, kind: LayerKind) -> str | None:
        if kind is LayerKind.LINEAR:
            return 'SGLang has no kernel for it; choose it for experts alone: {"moe": "int8"}'
        if is_hip():
            return "it has not been run on ROCm"
        backend = get_moe_runner_backend()
        if not (backend.is_auto() or backend.is_triton()):
            return f"its kernel is Triton's, and --moe-runner-backend is {backend.value}"
        return None

    def method(self, kind: LayerKind, layer: torch.nn.Module, name: str) -> Any:
        return Int8ExpertsMethod()

    def plan(self, kind: LayerKind, method: Any) -> LayerPlan:
        return Int8ExpertsPlan()

    def stored(self) -> StoredFormat | None:
        return None  # No quantization method of SGLang's reads it.


class Int8ExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Serves int8 w13 ``[E, 2I, H]`` and w2 ``[E, H, I]`` with float32 scales ``[E, 2I, 1]`` and ``[E, H, 1]``."""

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        with_bias: bool = False,  # noqa: FBT001
        **extra_weight_attrs: Any,
    ) -> None:
        if with_bias:
            raise ValueError("Experts with biases are not covered.")
        shards = 2 if layer.moe_runner_config.is_gated else 1  # type: ignore[union-attr]
        shapes = {
            "w13": (num_experts, shards * intermediate_size_per_partition, hidden_size),
            "w2": (num_experts, hidden_size, intermediate_size_per_partition),
        }
        for name, shape in shapes.items():
            weight = torch.nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
            set_weight_attrs(weight, extra_weight_attrs)
            layer.register_parameter(f"{name}_weight", weight)
            scale = torch.nn.Parameter(torch.ones((*shape[:2], 1), dtype=torch.float32), requires_grad=False)
            set_weight_attrs(scale, {**extra_weight_attrs, "quant_method": FusedMoeWeightScaleSupported.CHANNEL.value})
            layer.register_parameter(f"{name}_weight_scale", scale)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing is repacked."""

    def create_moe_runner(self, layer: torch.nn.Module, moe_runner_config: Any) -> None:
        self.moe_runner_config = moe_runner_config
        self.runner = MoeRunner(MoeRunnerBackend.TRITON, moe_runner_config)

    def apply(self, layer: torch.nn.Module, dispatch_output: Any) -> Any:
        return self.runner.run(dispatch_output, self.get_triton_quant_info(layer))

    def get_triton_quant_info(self, layer: torch.nn.Module) -> Any:
        return TritonMoeQuantInfo(
            w13_weight=layer.w13_weight,
            w2_weight=layer.w2_weight,
            use_int8_w8a16=True,
            w13_scale=layer.w13_weight_scale,
            w2_scale=layer.w2_weight_scale,
        )


class Int8ExpertsPlan(ExpertRowsPlan):
    """Loads int8 experts just like fp8 experts with per-row scales."""

    def quantizer(self) -> UnitQuantizer:
        return Int8RowQuantizer()


class Int8RowQuantizer(AssembledUnits):
    """A row's scale is its largest magnitude over 127; values are rounded to nearest, ties to even. In float32."""

    # Quotients are float32.
    at_once: ClassVar[int] = AssembledUnits.at_once // 4

    def quantize_units(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        columns = values.shape[-1]
        rows, out, scales = values.reshape(-1, columns), weight.view(-1, columns), scale.view(-1, 1)
        if not values.is_cpu:
            largest = _quantize_rows(rows, out, scales)
        else:
            # In parts, so that intermediates stay in cache.
            at_once = max(1, CHUNK_ELEMENTS // columns)
            parts = zip(rows.split(at_once), out.split(at_once), scales.split(at_once), strict=True)
            largest = torch.cat([_quantize_rows(*part) for part in parts])
        return largest.view(len(values), -1).amax(1)

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        factors = scale.reshape(-1, 1).expand(weight.shape)[slices(piece.box)]
        restored = weight[slices(piece.box)].float() * factors
        return not bool(((restored - piece.values.float()).abs() > 0.51 * factors).any())


def _quantize_rows(rows: torch.Tensor, out: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantize ``[rows, columns]`` with ``scale`` ``[rows, 1]``; returns largest magnitudes, ``[rows, 1]``."""
    largest: torch.Tensor = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    torch.div(largest.clamp(min=1e-10), INT8_MAX, out=scale)
    # A quotient exceeds 127 at most by float32 rounding.
    out.copy_((rows / scale).round_())
    return largest


INT8 = Int8Scheme()
