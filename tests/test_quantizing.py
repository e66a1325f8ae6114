# SPDX-License-Identifier: Apache-2.0
"""``sglang_overlay.quantize`` makes what a server makes, to the bit, and a server takes it as it is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from harness.mutations import altered
from sglang.srt.layers.quantization import fp8
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, compare
from workbench.loads.updates import Update

from sglang_overlay import quantize
from sglang_overlay.errors import QuantizeError, SchemeError
from sglang_overlay.settings import SCHEME_VARIABLE

SEED = 1
E4M3 = torch.float8_e4m3fn
INT8 = '{"linear": "channel", "moe": "int8"}'
LEFT_OUT = "layers.0.self_attn.o_proj"
MIXED = f'{{"linear": "channel", "moe": "block", "ignore": ["{LEFT_OUT}"], "overrides": {{"qkv_proj": "tensor"}}}}'
HALVES = (("num_hidden_layers", 2),)
STORED = {
    "block": [(E4M3, "_scale_inv", (2, 3))],
    "channel": [(E4M3, "_scale", (256, 1))],
    "tensor": [(E4M3, "_scale", ())],
    "stock": [(E4M3, "_scale", ())],
    "mxfp8": [(E4M3, "_scale_inv", (256, 12))],
}
"""What becomes of qwen3's down_proj, ``[256, 384]``."""


@pytest.fixture
def load(workers, checkpoint):
    """A streamed load of a family by a scheme."""

    def run(family, scheme, *updates, seed=0, overrides=HALVES, **fields):
        path = checkpoint(family, seed=seed, overrides=overrides)
        quantization = "mxfp8" if scheme == "mxfp8" else "fp8"
        environ = {} if scheme in ("mxfp8", "stock") else {SCHEME_VARIABLE: scheme}
        job = LoadJob(path, streaming="require", quantization=quantization, environ=environ, updates=updates, **fields)
        return workers.load(job)

    return run


@pytest.fixture
def quantized(checkpoint, tmp_path):
    """Folders with the new weights of a family as ``quantize`` returns them: one, or one for each of several ranks."""

    def make(family, scheme, ranks=1, overrides=HALVES, **how):
        found = []

        def change(rank):
            def apply(tensors):
                made = quantize(dict(tensors), scheme, **({"tp_size": ranks} if ranks > 1 else {}), **how)
                found.append({name for name, tensor in made.items() if tensor.dtype in (E4M3, torch.int8)})
                scales = {name: tensor for name, tensor in made.items() if name not in tensors}
                assert {name.rpartition("_scale")[0] for name in scales} == found[-1]
                tensors.update(made)
                tensors.update({name: _of_rank(tensor, rank) for name, tensor in scales.items()})

            return apply

        path = checkpoint(family, seed=SEED, overrides=overrides)
        for rank in range(ranks):
            altered(path, tmp_path / "sent" / (f"rank-{rank}" if ranks > 1 else ""), change(rank))
        return tmp_path / "sent", found[0]

    return make


def _of_rank(scales, rank):
    """A rank's scales: the last dimension counts ranks where they have scales of their own."""
    is_apart = scales.ndim in (1, 3)
    return scales[..., rank] if is_apart else scales


@pytest.mark.parametrize(
    ("family", "scheme"),
    [
        ("qwen3", "stock"),
        ("qwen3", "channel"),
        pytest.param("qwen3", "block", marks=pytest.mark.nightly),
        pytest.param("qwen3", "mxfp8", marks=pytest.mark.nightly),
        *(("qwen3_moe", scheme) for scheme in ("stock", "channel", "block", "mxfp8")),
        pytest.param("qwen3_moe", INT8, id="qwen3_moe-int8"),
        pytest.param("qwen3_moe", MIXED, id="qwen3_moe-mixed"),
        *(("deepseek_v3", scheme) for scheme in ("tensor", "block", "mxfp8")),
    ],
)
def test_server_takes_what_is_returned_and_ends_as_if_it_had_loaded_it(family, scheme, load, quantized):
    folder, names = quantized(family, scheme)
    linear = {"q_proj", "o_proj", "down_proj"} if family != "deepseek_v3" else {"q_b_proj", "kv_a_proj_with_mqa"}
    assert linear <= {name.split(".")[-2] for name in names}
    assert not [name for name in names if "kv_b_proj" in name or "norm" in name or "mlp.gate." in name]
    result = load(family, scheme, Update("tensor", folder), prompts=PROMPTS)
    (answer,) = result.ranks[0].updates
    assert answer.success, answer.message
    assert compare(load(family, scheme, seed=SEED, prompts=PROMPTS), result) == []


@pytest.mark.parametrize("scheme", ["stock", "channel"])
def test_each_of_two_ranks_takes_its_own_scales(scheme, load, quantized):
    folder, _ = quantized("qwen3_moe", scheme, ranks=2, kv_heads=2)
    result = load("qwen3_moe", scheme, Update("tensor", folder), tp_size=2)
    assert [rank.updates[0].success for rank in result.ranks] == [True, True], result.ranks[0].updates[0].message
    assert compare(load("qwen3_moe", scheme, seed=SEED, tp_size=2), result) == []


def test_stocks_scales_of_channels_are_of_a_ranks_columns(monkeypatch, load, quantized):
    """As on a GPU with cutlass's kernels, for which stock quantizes linear layers by channel."""
    monkeypatch.setattr(fp8, "cutlass_fp8_supported", lambda: True)
    folder, _ = quantized("qwen3", "stock", ranks=2)
    by_channel = {"tp_size": 2, "recorder": "harness.channels:by_channel"}
    result = load("qwen3", "stock", Update("tensor", folder), **by_channel)
    assert [rank.updates[0].success for rank in result.ranks] == [True, True], result.ranks[0].updates[0].message
    fresh = load("qwen3", "stock", seed=SEED, **by_channel)
    scales = [rank.tensors["model.layers.0.mlp.down_proj.weight_scale"] for rank in fresh.ranks]
    assert scales[0].shape == (1, 256)
    assert scales[0].sha256 != scales[1].sha256
    assert compare(fresh, result) == []


@pytest.mark.parametrize("scheme", STORED)
def test_shapes_and_dtypes(scheme):
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = {name: torch.randn(256, 384), "model.norm.weight": torch.ones(256)}
    ((dtype, suffix, shape),) = STORED[scheme]
    made = quantize(tensors, scheme)
    assert list(made) == [name, name + suffix, "model.norm.weight"]
    assert (made[name].dtype, made[name].shape) == (dtype, (256, 384))
    assert made[name + suffix].shape == shape
    assert made["model.norm.weight"] is tensors["model.norm.weight"]


def test_values_times_scales_are_the_weights_rounded():
    weight = torch.randn(256, 384).bfloat16()
    name = "mlp.down_proj.weight"
    found = {scheme: quantize({name: weight}, scheme) for scheme in ("tensor", "channel", "block", "mxfp8")}
    factors = {
        "tensor": found["tensor"][f"{name}_scale"],
        "channel": found["channel"][f"{name}_scale"],
        "block": found["block"][f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1),
        "mxfp8": torch.exp2(found["mxfp8"][f"{name}_scale_inv"].float() - 127).repeat_interleave(32, 1),
    }
    for scheme, made in found.items():
        wrong = (made[name].float() * factors[scheme] - weight).norm() / weight.norm()
        assert 0.01 < wrong < 0.04, scheme


@pytest.mark.parametrize(
    ("tensors", "arguments", "said"),
    [
        ({"q_proj": (64, 32)}, {}, r"attn.q_proj.weight in the same call give attn.k_proj.weight, attn.v_proj.weight"),
        ({"gate_proj": (64, 32)}, {"scheme": "tensor"}, r"in the same call give attn.up_proj.weight"),
        (
            {"q_a_proj": (96, 128), "kv_a_proj_with_mqa": (128, 128)},
            {"scheme": "block"},
            r"q_a_proj.weight \[96, 128\] ends within a block of 128 rows",
        ),
        (
            {"q_proj": (64, 32), "k_proj": (64, 32), "v_proj": (64, 32)},
            {"tp_size": 2},
            "kv_heads=None does not say that each of 2 ranks has key-value heads of its own",
        ),
        ({"qkv_proj": (64, 32)}, {"tp_size": 2, "kv_heads": 4}, "qkv_proj.weight is one tensor, of whose parts"),
        ({"o_proj": (64, 32)}, {"tp_size": 3}, r"o_proj.weight \[64, 32\] does not divide over 3 ranks"),
        ({"o_proj": (64, 40)}, {"scheme": "mxfp8"}, "o_proj as 'mxfp8': 40 columns are not a multiple of 32"),
    ],
)
def test_what_the_tensors_do_not_tell_is_an_error_that_names_them(tensors, arguments, said):
    made = {f"attn.{part}.weight": torch.randn(shape) for part, shape in tensors.items()}
    with pytest.raises(QuantizeError, match=said):
        quantize(made, **arguments)


@pytest.mark.parametrize(
    ("scheme", "said"), [("blocks", "no quantization scheme 'blocks'"), ("int8", "'int8' is not for linear layers")]
)
def test_scheme_that_there_is_not_is_an_error(scheme, said):
    with pytest.raises(SchemeError, match=said):
        quantize({"o_proj.weight": torch.ones(1, 1), "mlp.down_proj.weight": torch.randn(64, 32)}, scheme)


def test_query_of_mla_without_low_rank_is_a_layer_of_its_own():
    tensors = {f"a.{part}.weight": torch.randn(64, 64) for part in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj")}
    made = quantize(tensors, "tensor")
    alone = quantize({"a.o_proj.weight": tensors["a.q_proj.weight"]}, "tensor")
    assert torch.equal(made["a.q_proj.weight_scale"], alone["a.o_proj.weight_scale"])
    assert "a.kv_a_proj_with_mqa.weight_scale" in made
    assert made["a.kv_b_proj.weight"] is tensors["a.kv_b_proj.weight"]


def test_importing_the_package_imports_neither_torch_nor_sglang():
    code = "import sglang_overlay, sys; print([name for name in ('torch', 'sglang') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
