# SPDX-License-Identifier: Apache-2.0
"""fp8 experts by dequantizing those that received tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import gelu, linear, silu

from sglang_overlay.cpu_reference.linear import dequantize, dequantize_blocks
from sglang_overlay.cpu_reference.mxfp8 import dequantize_groups

Dequantize = Callable[..., torch.Tensor]
"""``(weight, scale, dtype=...)``: a matrix of the dtype."""

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": silu, "gelu": gelu}


def apply(self: Any, layer: torch.nn.Module, dispatch_output: Any) -> Any:
    """SGLang's ``Fp8MoEMethod.apply`` on a CPU.

    The routed scaling factor is left to the model: SGLang's models multiply by it themselves wherever the platform is
    not CUDA. The all-reduce over ranks is SGLang's too.

    Args:
        self: the ``Fp8MoEMethod``.
        layer: the ``FusedMoE`` layer, with w13_weight ``[E, 2I, H]``, w2_weight ``[E, H, I]``, and one scale per expert
            or, block-wise, one per block of each; as exponents (uint8) in MXFP8.
        dispatch_output: SGLang's ``StandardDispatchOutput``.

    Raises:
        NotImplementedError: for fp4 experts, biases, or an activation without a reference here.
    """
    if getattr(self, "is_fp4_expert", False) or self.with_bias:  # Since 0.5.12.
        raise NotImplementedError("the CPU reference platform has neither fp4 experts nor experts with biases")
    if not self.block_quant:
        return _apply(self.moe_runner_config, layer, dispatch_output, "weight_scale", dequantize)
    blocks = functools.partial(dequantize_blocks, block_size=self.quant_config.weight_block_size)
    unpack = dequantize_groups if self.use_mxfp8 else blocks
    return _apply(self.moe_runner_config, layer, dispatch_output, "weight_scale_inv", unpack)


def apply_weights(self: Any, layer: torch.nn.Module, dispatch_output: Any) -> Any:
    """SGLang's ``CompressedTensorsW8A8Fp8MoE.apply_weights``, and its like with int8 weights, on a CPU.

    Args:
        self: has the layer's ``moe_runner_config``.
        layer: the ``FusedMoE`` layer, with scales ``[E, rows, 1]``, one for each output channel.
        dispatch_output: SGLang's ``StandardDispatchOutput``.

    Raises:
        NotImplementedError: for an activation without a reference here.
    """
    return _apply(self.moe_runner_config, layer, dispatch_output, "weight_scale", dequantize)


def _apply(config: Any, layer: torch.nn.Module, dispatch_output: Any, scale: str, unpack: Dequantize) -> Any:
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    _check(config)
    weights, ids, _ = dispatch_output.topk_output
    output = experts(
        dispatch_output.hidden_states,
        weights,
        ids,
        (layer.get_parameter("w13_weight"), layer.get_parameter(f"w13_{scale}")),
        (layer.get_parameter("w2_weight"), layer.get_parameter(f"w2_{scale}")),
        unpack,
        activation=config.activation,
        weight_input=config.apply_router_weight_on_input,
    )
    return StandardCombineInput(hidden_states=output)


def experts(
    tokens: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    w13: tuple[torch.Tensor, torch.Tensor],
    w2: tuple[torch.Tensor, torch.Tensor],
    unpack: Dequantize = dequantize,
    *,
    activation: str = "silu",
    weight_input: bool = False,
) -> torch.Tensor:
    """Gated feed-forward experts over routed tokens; sums over a token's experts in float32.

    Only experts that received tokens are dequantized, one at a time.

    Args:
        tokens: ``[T, H]`` in the model's dtype.
        weights: ``[T, K]`` float32, the router's weights.
        ids: ``[T, K]`` integer; local expert numbers, -1 for an expert another rank holds.
        w13: gate and up projection ``[E, 2I, H]`` float8_e4m3fn, and its scales ``[E, ...]`` float32.
        w2: down projection ``[E, H, I]`` float8_e4m3fn, and its scales ``[E, ...]`` float32.
        unpack: turns an expert's weight and its scales into a matrix of a dtype.
        activation: of the gate; "silu" or "gelu".
        weight_input: weight the expert's input, not its output.

    Returns:
        ``[T, H]`` in the dtype of ``tokens``.
    """
    output = torch.zeros(tokens.shape, dtype=torch.float32, device=tokens.device)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        share = weights[rows, slots].unsqueeze(1)
        chosen = tokens[rows]
        if weight_input:
            chosen, share = (chosen * share).to(tokens.dtype), torch.ones_like(share)
        hidden = _gated(chosen, unpack(w13[0][expert], w13[1][expert], dtype=tokens.dtype), activation)
        down = linear(hidden, unpack(w2[0][expert], w2[1][expert], dtype=tokens.dtype))
        output.index_add_(0, rows, down.float() * share)
    return output.to(tokens.dtype)


def add_gated_shared_experts(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """SGLang's ``fused_gate_sigmoid_mul_add`` on a CPU: add ``sigmoid(hidden . gate) * shared`` in place.

    Computed in float32 and rounded once, as the Triton kernel does.

    Args:
        hidden_states: ``[T, H]``.
        gate_weight: ``[H]``.
        shared_output: ``[T, H]``, the shared expert's output.
        final_hidden_states: ``[T, H]``, the routed experts' output; added to.
    """
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.float()).unsqueeze(-1)
    final_hidden_states.copy_(final_hidden_states.float() + gate * shared_output.float())


def _gated(tokens: torch.Tensor, w13: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = linear(tokens, w13).chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gate) * up


def _check(config: Any) -> None:
    limit = getattr(config, "swiglu_limit", None)  # Since 0.5.12.
    plain = config.is_gated and config.gemm1_alpha is None and limit is None
    if not plain or config.activation not in _ACTIVATIONS:
        raise NotImplementedError(
            f"the CPU reference platform has gated {'/'.join(_ACTIVATIONS)} experts without clamping; layer "
            f"{config.layer_id} has activation {config.activation!r}, is_gated={config.is_gated}, "
            f"swiglu_limit={limit}"
        )
