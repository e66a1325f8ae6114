"""fp8 experts and the gated shared expert against the same computation in float64."""

from __future__ import annotations

import pytest
import torch

from sglang_overlay.cpu_reference import moe
from sglang_overlay.cpu_reference.quantizer import quantize_per_tensor

TOKENS, HIDDEN, WIDTH, EXPERTS, CHOSEN = 11, 48, 32, 6, 2
Quantized = tuple[torch.Tensor, torch.Tensor]


def quantized_experts(rows: int, columns: int, generator: torch.Generator) -> Quantized:
    pairs = [
        quantize_per_tensor(torch.randn(rows, columns, generator=generator) * 0.1 * (expert + 1))
        for expert in range(EXPERTS)
    ]
    return torch.stack([weight for weight, _ in pairs]), torch.cat([scale for _, scale in pairs])


@pytest.fixture
def layer() -> dict[str, torch.Tensor | Quantized]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    weights, ids = scores.softmax(-1).topk(CHOSEN)
    return {
        "tokens": torch.randn(TOKENS, HIDDEN, generator=generator),
        "weights": weights,
        "ids": ids.to(torch.int32),
        "w13": quantized_experts(2 * WIDTH, HIDDEN, generator),
        "w2": quantized_experts(HIDDEN, WIDTH, generator),
    }


def in_float64(layer: dict, activation: str = "silu", weight_input: bool = False) -> torch.Tensor:
    functions = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
    w13 = layer["w13"][0].double() * layer["w13"][1].double()[:, None, None]
    w2 = layer["w2"][0].double() * layer["w2"][1].double()[:, None, None]
    output = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
    for token in range(TOKENS):
        for weight, expert in zip(layer["weights"][token].double(), layer["ids"][token].tolist(), strict=True):
            if expert < 0:
                continue
            x = layer["tokens"][token].double() * (weight if weight_input else 1)
            gate, up = (w13[expert] @ x).chunk(2)
            output[token] += (w2[expert] @ (functions[activation](gate) * up)) * (1 if weight_input else weight)
    return output


def assert_near(output: torch.Tensor, exact: torch.Tensor, units: float) -> None:
    """``units`` half-ulps of the output's dtype, relative to the largest output."""
    limit = units * torch.finfo(output.dtype).eps / 2 * exact.abs().max()
    assert (output.double() - exact).abs().max() <= limit


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("weight_input", [False, True])
def test_matches_float64(layer: dict, activation: str, weight_input: bool) -> None:
    output = moe.experts(**layer, activation=activation, weight_input=weight_input)
    assert_near(output, in_float64(layer, activation, weight_input), units=64)


def test_bfloat16_differs_by_rounding_only(layer: dict) -> None:
    layer["tokens"] = layer["tokens"].to(torch.bfloat16)
    output = moe.experts(**layer)
    assert output.dtype == torch.bfloat16
    # Rounded: two weights, gate_up, its activation and product, the down projection, the sum.
    assert_near(output, in_float64(layer), units=8)


def test_experts_of_other_ranks_add_nothing(layer: dict) -> None:
    layer["ids"][:, 0] = -1
    assert_near(moe.experts(**layer), in_float64(layer), units=64)
    layer["ids"][:] = -1
    assert torch.equal(moe.experts(**layer), torch.zeros(TOKENS, HIDDEN))


def test_experts_without_tokens_are_not_touched(layer: dict) -> None:
    layer["ids"][layer["ids"] == 3] = 2
    exact = in_float64(layer)
    layer["w13"][1][3] = float("nan")
    assert_near(moe.experts(**layer), exact, units=64)


def test_no_tokens(layer: dict) -> None:
    layer |= {name: layer[name][:0] for name in ("tokens", "weights", "ids")}
    assert moe.experts(**layer).shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gated_shared_expert_is_added_in_place(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, shared, routed = (torch.randn(5, HIDDEN, generator=generator).to(dtype) for _ in range(3))
    gate = torch.randn(HIDDEN, generator=generator).to(dtype)
    exact = routed.double() + torch.sigmoid(hidden.double() @ gate.double())[:, None] * shared.double()
    moe.add_gated_shared_experts(hidden, gate, shared, routed)
    assert_near(routed, exact, units=8)
