# SPDX-License-Identifier: Apache-2.0
"""fp8 experts by dequantizing those that received tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import gelu, linear, silu

from sglang_overlay.cpu_reference.linear import dequantize

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"silu": silu, "gelu": gelu}


def apply(self: Any, layer: torch.nn.Module, dispatch_output: Any) -> Any:
    """SGLang's ``Fp8MoEMethod.apply`` on a CPU.

    The routed scaling factor is left to the model: SGLang's models multiply by it themselves wherever the platform is
    not CUDA. The all-reduce over ranks is SGLang's too.

    Args:
        self: the ``Fp8MoEMethod``.
        layer: the ``FusedMoE`` layer, with w13_weight ``[E, 2I, H]``, w2_weight ``[E, H, I]`` and one scale per expert.
        dispatch_output: SGLang's ``StandardDispatchOutput``.

    Raises:
        NotImplementedError: for block-wise scales, or an activation without a reference here.
    """
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    config = self.moe_runner_config
    _check(self, config)
    weights, ids, _ = dispatch_output.topk_output
    output = experts(
        dispatch_output.hidden_states,
        weights,
        ids,
        (layer.get_parameter("w13_weight"), layer.get_parameter("w13_weight_scale")),
        (layer.get_parameter("w2_weight"), layer.get_parameter("w2_weight_scale")),
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
        w13: gate and up projection ``[E, 2I, H]`` float8_e4m3fn, and its scales ``[E]`` float32.
        w2: down projection ``[E, H, I]`` float8_e4m3fn, and its scales ``[E]`` float32.
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
        hidden = _gated(chosen, w13[0][expert], w13[1][expert], activation)
        down = linear(hidden, dequantize(w2[0][expert], w2[1][expert], tokens.dtype))
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


def _gated(tokens: torch.Tensor, w13: torch.Tensor, scale: torch.Tensor, activation: str) -> torch.Tensor:
    gate, up = linear(tokens, dequantize(w13, scale, tokens.dtype)).chunk(2, dim=-1)
    return _ACTIVATIONS[activation](gate) * up


def _check(method: Any, config: Any) -> None:
    if method.block_quant or method.is_fp4_expert:
        raise NotImplementedError("the CPU reference platform has per-tensor fp8 experts, not block-wise or fp4 ones")
    plain = config.is_gated and config.gemm1_alpha is None and config.swiglu_limit is None and not method.with_bias
    if not plain or config.activation not in _ACTIVATIONS:
        raise NotImplementedError(
            f"the CPU reference platform has gated {'/'.join(_ACTIVATIONS)} experts without bias or clamping; layer "
            f"{config.layer_id} has activation {config.activation!r}, is_gated={config.is_gated}, "
            f"swiglu_limit={config.swiglu_limit}, with_bias={method.with_bias}"
        )
