"""Layers of a DeepSeek-V3 that real SGLang loaded and ran, against the same layers in float64.

Nothing of SGLang is used here: attention is written in its expanded form, with keys and values of every head, where
the platform runs the absorbed one.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from workbench.loads.checkpoints import CheckpointSpec, build, model_config

HERE = Path(__file__).parent
SPEC = CheckpointSpec("deepseek_v3")
CONFIG = model_config(SPEC)
#: As in layer_capture.py.
LENGTHS = (5, 9)

pytestmark = pytest.mark.server
Capture = dict[str, Any]


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Capture]:
    folder = tmp_path_factory.mktemp("layers")
    out, log = folder / "captured.pt", folder / "log"
    paths = [str(HERE.parents[1] / "ci"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "SGLANG_STREAMFP8": "0"}
    environ.pop("SGLANG_USE_CPU_ENGINE", None)
    command = [sys.executable, str(HERE / "layer_capture.py"), str(build(SPEC, folder)), str(out)]
    with log.open("w") as file:
        done = subprocess.run(command, env=environ, stdout=file, stderr=file, timeout=400)
    assert done.returncode == 0, log.read_text()[-4000:]
    return torch.load(out)


def matrix(tensors: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A linear layer's weight as ``[N, K]`` float64, dequantized where it is fp8 (which SGLang holds as ``[K, N]``)."""
    weight = tensors[f"{name}weight"]
    if weight.dtype == torch.float8_e4m3fn:
        return weight.t().double() * tensors[f"{name}weight_scale"].double()
    return weight.double()


def rms_norm(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return values / (values.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).sqrt() * weight.double()


def yarn_frequencies() -> torch.Tensor:
    """Rotary frequencies with YaRN's ramp between interpolated and original ones (arXiv:2309.00071)."""
    scaling, dim, base = CONFIG["rope_scaling"], CONFIG["qk_rope_head_dim"], CONFIG["rope_theta"]

    def dimension_of(rotations: float) -> float:
        turns = scaling["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(base))

    low = max(math.floor(dimension_of(scaling["beta_fast"])), 0)
    high = min(math.ceil(dimension_of(scaling["beta_slow"])), dim - 1)
    original = base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return original / scaling["factor"] * ramp + original * (1 - ramp)


def softmax_scale() -> float:
    scaling = CONFIG["rope_scaling"]
    magnitude = 0.1 * scaling["mscale_all_dim"] * math.log(scaling["factor"]) + 1
    return magnitude**2 / math.sqrt(CONFIG["qk_nope_head_dim"] + CONFIG["qk_rope_head_dim"])


def rotate(values: torch.Tensor) -> torch.Tensor:
    """Rotate neighbouring pairs of ``[T, ..., D]`` by position times frequency."""
    pairs = torch.view_as_complex(values.contiguous().reshape(*values.shape[:-1], -1, 2))
    angles = torch.arange(len(values), dtype=torch.float64)[:, None] * yarn_frequencies()
    turned = pairs * torch.polar(torch.ones_like(angles), angles).reshape(len(values), *[1] * (values.dim() - 2), -1)
    return torch.view_as_real(turned).flatten(-2)


def mla(hidden: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Multi-head latent attention over one whole sequence ``[T, H]``, expanded, in float64."""
    heads, nope = CONFIG["num_attention_heads"], CONFIG["qk_nope_head_dim"]
    latent = hidden.double() @ matrix(tensors, "fused_qkv_a_proj_with_mqa.").t()
    sizes = [CONFIG["q_lora_rank"], CONFIG["kv_lora_rank"], CONFIG["qk_rope_head_dim"]]
    query_latent, kv_latent, key_rope = latent.split(sizes, dim=-1)
    query = rms_norm(query_latent, tensors["q_a_layernorm.weight"]) @ matrix(tensors, "q_b_proj.").t()
    query_nope, query_rope = query.reshape(len(hidden), heads, -1).split([nope, sizes[2]], dim=-1)
    kv_latent = rms_norm(kv_latent, tensors["kv_a_layernorm.weight"])
    keys = torch.einsum("tr,hnr->thn", kv_latent, tensors["w_kc"].double())
    values = torch.einsum("tr,hrv->thv", kv_latent, tensors["w_vc"].double())
    scores = torch.einsum("qhn,khn->hqk", query_nope, keys)
    scores = scores + torch.einsum("qhd,kd->hqk", rotate(query_rope), rotate(key_rope))
    future = torch.ones(len(hidden), len(hidden), dtype=torch.bool).triu(1)
    shares = (scores * softmax_scale()).masked_fill(future, -torch.inf).softmax(-1)
    mixed = torch.einsum("hqk,khv->qhv", shares, values).flatten(1)
    return mixed @ matrix(tensors, "o_proj.").t()


def sequences(calls: list[dict[str, torch.Tensor]], name: str) -> list[torch.Tensor]:
    """Prefill and decode steps of each request put together, ``[T, ...]`` each."""
    prefill = calls[0][name].split(LENGTHS)
    return [torch.cat([part, *(call[name][row : row + 1] for call in calls[1:])]) for row, part in enumerate(prefill)]


def relative_error(output: torch.Tensor, exact: torch.Tensor) -> float:
    return ((output.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize(
    ("model", "limit"),
    [
        # float32 throughout: sums of some hundred terms.
        ("float32", 1e-5),
        # Eight roundings to bfloat16 in a row (half an ulp is 2^-9), and scores whose error the softmax passes on.
        ("fp8", 3e-2),
    ],
)
def test_mla_attention(captures: dict[str, Capture], model: str, limit: float) -> None:
    calls, tensors = captures[model]["calls"]["attention"], captures[model]["tensors"]["attention"]
    assert calls
    for hidden, output in zip(sequences(calls, "hidden_states"), sequences(calls, "output"), strict=True):
        assert relative_error(output, mla(hidden, tensors)) < limit


def test_w_kc_and_w_vc_are_kv_b_proj(captures: dict[str, Capture]) -> None:
    tensors = captures["float32"]["tensors"]["attention"]
    heads, nope = CONFIG["num_attention_heads"], CONFIG["qk_nope_head_dim"]
    keys, values = tensors["kv_b_proj.weight"].unflatten(0, (heads, -1)).split([nope, CONFIG["v_head_dim"]], dim=1)
    assert torch.equal(tensors["w_kc"], keys)
    assert torch.equal(tensors["w_vc"], values.transpose(1, 2))


def test_fp8_linear(captures: dict[str, Capture]) -> None:
    weight = matrix(captures["fp8"]["tensors"]["linear"], "")
    assert captures["fp8"]["calls"]["linear"]
    for call in captures["fp8"]["calls"]["linear"]:
        # Weight and result are rounded to bfloat16.
        assert relative_error(call["output"], call["arg0"].double() @ weight.t()) < 2 * 2**-8


def test_fp8_experts(captures: dict[str, Capture]) -> None:
    tensors = captures["fp8"]["tensors"]["experts"]
    w13, w2 = (
        tensors[f"{name}_weight"].double() * tensors[f"{name}_weight_scale"].double()[:, None, None]
        for name in ("w13", "w2")
    )
    assert captures["fp8"]["calls"]["experts"]
    for call in captures["fp8"]["calls"]["experts"]:
        gate, up = torch.einsum("th,ekoh->etko", call["arg0"].double(), w13.unflatten(1, (2, -1))).unbind(2)
        outputs = torch.einsum("eto,eho->eth", torch.nn.functional.silu(gate) * up, w2)
        routed = torch.zeros(w13.shape[0], len(call["arg0"]), dtype=torch.float64)
        routed.t().scatter_(1, call["topk_ids"].long(), call["topk_weights"].double())
        # Rounded to bfloat16: both weights, gate_up, its activation and product, the down projection, the sum.
        assert relative_error(call["output"], (outputs * routed.unsqueeze(-1)).sum(0)) < 4 * 2**-8
