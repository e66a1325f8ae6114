# SPDX-License-Identifier: Apache-2.0
"""Updates with values that a trainer has quantized itself: taken to the bit with their scales, or refused by name."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from harness.exports import ExportJob, run_export
from harness.mutations import altered
from safetensors.torch import load_file
from workbench.loads.fingerprints import hash_of
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, compare
from workbench.loads.updates import Update

from sglang_overlay.core.regions import whole as whole_of
from sglang_overlay.core.staging import Piece
from sglang_overlay.cpu_reference.per_tensor import KernelArithmetic, PerTensorQuantizer, RatioArithmetic
from sglang_overlay.settings import SCHEME_VARIABLE

SEED = 1
BLOCKS = (("hidden_size", 256), ("intermediate_size", 512), ("moe_intermediate_size", 256), ("head_dim", 128))
"""Sizes that divide into blocks of 128 over two ranks."""
ROUNDED_UP = (("moe_intermediate_size", 96),)
SOURCES = {
    "disk": {"source": "disk"},
    "tensors": {"source": "tensor"},
    "buckets": {"source": "bucket"},
}


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    """The new weights of a family, quantized by a scheme as trainers send them."""

    @cache
    def export(family, scheme, overrides=()):
        folder = tmp_path_factory.mktemp("exported") / "out"
        new = checkpoint(family, seed=SEED, overrides=overrides)
        if scheme in BY_HAND:
            return altered(new, folder, BY_HAND[scheme])
        run_export(ExportJob(new, folder, scheme))
        return folder

    return export


def per_tensor(tensors, experts=True):
    """Quantize linear layers, and experts, with one scale for what is served with one: q, k and v, gate and up."""
    together = {}
    for name in [name for name in tensors if "_proj" in name and (experts or "experts" not in name)]:
        together.setdefault(re.sub("[qkv]_proj", "qkv", re.sub("(gate|up)_proj", "gate_up", name)), []).append(name)
    limit = torch.finfo(torch.float8_e4m3fn).max
    for fused, names in together.items():
        values = torch.cat([tensors[name] for name in names])
        arithmetic = (KernelArithmetic if "experts" in fused else RatioArithmetic)(limit)
        weight, scale = torch.empty(values.shape, dtype=torch.float8_e4m3fn), torch.empty(())
        PerTensorQuantizer(arithmetic).quantize([Piece(whole_of(values.shape), values)], weight, scale)
        for name, part in zip(names, weight.split([len(tensors[name]) for name in names]), strict=True):
            tensors[name] = part
            # With a dimension, as compressed-tensors has it, and without, as AutoFP8.
            tensors[f"{name}_scale"] = scale.clone() if "up_proj" in name else scale.view(1).clone()


def int8_experts(tensors):
    """Quantize experts by row to int8, and the linear layers per tensor."""
    for name in [name for name in tensors if "experts" in name]:
        largest = tensors[name].float().abs().amax(1, keepdim=True)
        tensors[f"{name}_scale"] = largest.clamp(min=1e-10) / 127
        tensors[name] = (tensors[name] / tensors[f"{name}_scale"]).round().to(torch.int8)
    per_tensor(tensors, experts=False)


INT8 = '{"moe": "int8"}'
BY_HAND = {"": per_tensor, "tensor": per_tensor, INT8: int8_experts}
"""Schemes that ``export`` has no form for."""
TAKEN = [
    ("qwen3", "block"),
    ("qwen3", ""),
    ("qwen3_moe", "block"),
    ("qwen3_moe", "channel"),
    ("qwen3_moe", "tensor"),
    ("qwen3_moe", INT8),
]


@pytest.fixture
def load(workers, checkpoint):
    """A streamed load of a family's weights by a scheme, with updates."""

    def run(family, scheme, *updates, seed=0, overrides=(), **fields):
        environ = {SCHEME_VARIABLE: scheme} if scheme else {}
        path = checkpoint(family, seed=seed, overrides=overrides)
        return workers.load(
            LoadJob(path, streaming="require", environ=environ, updates=updates, prompts=PROMPTS, **fields)
        )

    return run


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("family", "scheme"), TAKEN)
def test_values_with_scales_in_the_layout_that_is_served_are_taken_to_the_bit(family, scheme, source, load, exported):
    result = load(family, scheme, Update(checkpoint=exported(family, scheme), **SOURCES[source]))
    assert_taken(result, load(family, scheme, seed=SEED))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_each_rank_takes_its_part_of_values_and_scales(family, load, exported):
    sizes = {"overrides": BLOCKS, "tp_size": 2}
    result = load(family, "block", Update("tensor", exported(family, "block", BLOCKS)), **sizes)
    assert_taken(result, load(family, "block", seed=SEED, **sizes))


@pytest.mark.parametrize("ep_size", [1, 2])
def test_values_of_experts_that_sglang_rounds_up_are_taken_to_the_bit(ep_size, load, exported):
    """208 rows are 256 on two CPUs: what is sent ends within a unit, and its last rows and scales are nobody's."""
    overrides = (("moe_intermediate_size", 208), ("num_hidden_layers", 1))
    sizes = {"overrides": overrides, "tp_size": 2, "ep_size": ep_size}
    result = load("qwen3_moe", "channel", Update("tensor", exported("qwen3_moe", "channel", overrides)), **sizes)
    assert_taken(result, load("qwen3_moe", "channel", seed=SEED, **sizes))


@pytest.mark.parametrize("ep_size", [1, 2])
@pytest.mark.parametrize("scheme", ["channel", INT8])
def test_experts_that_sglang_rounds_up_take_values_and_scales(scheme, ep_size, load, exported):
    """Experts of 96 rows become 128 for two ranks, of which each has a half, or all: zeros come in high precision."""
    sizes = {"overrides": ROUNDED_UP, "tp_size": 2, "ep_size": ep_size}
    update = Update("tensor", exported("qwen3_moe", scheme, ROUNDED_UP), names="experts")
    result = load("qwen3_moe", scheme, update, **sizes)
    for rank, fresh in zip(result.ranks, load("qwen3_moe", scheme, seed=SEED, **sizes).ranks, strict=True):
        assert rank.updates[0].success, rank.updates[0].message
        # Of the rows of zeros, whose scales mean nothing, int8 has another.
        experts = [name for name in fresh.tensors if re.search(r"w13_weight$|w2_weight(_scale)?$", name)]
        assert len(experts) == 9
        assert [name for name in experts if rank.tensors[name] != fresh.tensors[name]] == []


def test_part_of_an_expert_that_sglang_rounds_up_is_an_error_and_nothing_has_changed(load, exported):
    sizes = {"overrides": ROUNDED_UP, "tp_size": 2}
    exports = exported("qwen3_moe", "channel", ROUNDED_UP)
    parts = r"experts\.1\.down_proj\.weight$", r"experts\.1\.up_proj\.weight$"
    result = load("qwen3_moe", "channel", *(Update("tensor", exports, names=part) for part in parts), **sizes)
    told = "float8_e4m3fn values without their scales"
    refused(result, [".w2_weight (", told], [".w13_weight (", told])
    assert compare(load("qwen3_moe", "channel", **sizes), result) == []


def assert_taken(result, fresh):
    """Every rank has updated in place, and ends as a fresh load of the new weights."""
    for rank in result.ranks:
        (done,) = rank.updates
        assert done.success, done.message
        assert done.moved == ()
    assert compare(fresh, result) == []


def test_stocks_scheme_takes_linear_layers_with_a_scale_a_channel(load, exported):
    names = "proj"
    result = load("qwen3", "channel", Update("tensor", exported("qwen3", "channel"), names=names))
    assert result.ranks[0].updates[0].success, result.ranks[0].updates[0].message
    new = load("qwen3", "channel", seed=SEED).ranks[0].tensors
    found = result.ranks[0].tensors
    assert {name for name in new if names in name and found[name] != new[name]} == set()


def refused(result, *named):
    """All updates failed, each naming what is wrong."""
    answers = result.ranks[0].updates
    assert [done.success for done in answers] == [False] * len(answers)
    for done, names in zip(answers, named, strict=True):
        assert all(name in done.message for name in names), done.message
        assert "All weights are those of before this update." in done.message
        assert "KeyError" not in done.message.partition(":")[0]
        assert ".." not in done.message


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_values_in_another_layout_are_refused_and_nothing_has_changed(family, load, exported):
    block = exported(family, "block")
    updates = [Update(checkpoint=block, **how) for how in SOURCES.values()]
    updates.append(Update("tensor", block, names=r"layers\.0\.self_attn\.o_proj"))
    result = load(family, "", *updates)
    # Models of experts pass over scales that they do not know.
    told = "float8_e4m3fn values without their scales in " if "moe" in family else "weight_scale_inv belongs to values"
    refused(result, *[[told, "weight_scale"]] * 3, ["o_proj.weight"])
    assert compare(load(family, ""), result) == []


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_values_without_scales_are_refused_and_nothing_has_changed(family, load, checkpoint, tmp_path):
    def cast(dtype):
        def change(tensors):
            for name in [name for name in tensors if "o_proj" in name or "kv_b_proj" in name or "norm" in name]:
                tensors[name] = tensors[name].to(dtype)

        return altered(checkpoint(family, seed=SEED), tmp_path / str(dtype), change)

    parts = ["o_proj", "layernorm", *(["kv_b_proj"] if family == "deepseek_v3" else [])]
    updates, named = [], []
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        folder = cast(dtype)
        updates += [Update("disk", folder), *(Update("tensor", folder, names=part) for part in parts)]
        updates.append(Update("direct", folder, names="o_proj"))
        named += [["float8"], *([part] for part in parts), ["o_proj"]]
    result = load(family, "", *updates)
    refused(result, *named)
    assert compare(load(family, ""), result) == []


def test_fused_parts_with_several_scales_are_refused_and_what_has_one_is_as_stock_serves_it(workers, load, checkpoint):
    """A checkpoint that is published with one scale a tensor, of which stock quantizes fused layers anew."""
    fp8 = checkpoint("qwen3", seed=SEED, stored="fp8")
    several = [Update("disk", fp8), Update("tensor", fp8, names="qkv|[qkv]_proj"), Update("bucket", fp8)]
    result = load("qwen3", "", *several)
    told = ["_proj.weight is served with one scale for all of its parts, and they came with 0."]
    refused(result, told, told, told)
    assert compare(load("qwen3", ""), result) == []
    served = "o_proj|down_proj"
    (rank,) = load("qwen3", "", Update("tensor", fp8, names=served)).ranks
    assert rank.updates[0].success, rank.updates[0].message
    stock = workers.load(LoadJob(fp8, streaming="0")).ranks[0].tensors
    layers = [name for name in stock if re.search(rf"({served})\.weight(_scale)?$", name)]
    assert len(layers) == 12
    assert [name for name in layers if rank.tensors[name] != stock[name]] == []


@pytest.mark.parametrize("overrides", [(), ROUNDED_UP], ids=["as_they_are", "rounded_up"])
def test_each_rank_takes_the_scale_of_a_whole_tensor(overrides, workers, load, checkpoint):
    fp8 = checkpoint("qwen3_moe", seed=SEED, stored="fp8", overrides=overrides)
    update = Update("tensor", fp8, names=r"o_proj|experts\.\d\.down")
    result = load("qwen3_moe", "tensor", update, overrides=overrides, tp_size=2)
    stock = workers.load(LoadJob(fp8, streaming="0", tp_size=2))
    for rank, expected in zip(result.ranks, stock.ranks, strict=True):
        assert rank.updates[0].success, rank.updates[0].message
        layers = [name for name in expected.tensors if re.search(r"(o_proj\.|w2_)weight(_scale)?$", name)]
        assert layers
        assert [name for name in layers if rank.tensors[name] != expected.tensors[name]] == []


def test_half_of_values_and_scales_is_an_error_that_names_it(load, exported):
    block = exported("qwen3_moe", "block")
    updates = [
        Update("tensor", block, names=r"o_proj\.weight$"),
        Update("tensor", block, names=r"o_proj\.weight_scale_inv"),
        Update("disk", block, names=r"experts\.[13]\.down_proj\.weight$"),
        Update("tensor", block, names=r"layers\.0\.mlp\.experts\.1\.(up_proj|gate_proj\.weight$)"),
    ]
    result = load("qwen3_moe", "block", *updates)
    refused(result, *[["o_proj.weight ("]] * 2, ["w2_weight ("], ["layers.0.mlp.experts.w13_weight ("])
    assert compare(load("qwen3_moe", "block"), result) == []


def powers_of_two(encode):
    """Quantize in blocks whose scales are powers of two, as trainers for DeepGEMM on Blackwell do; ``encode`` them."""

    def change(tensors):
        for name in [name for name in tensors if "_proj" in name and "kv_b_proj" not in name]:
            rows, columns = (-(-size // 128) for size in tensors[name].shape)
            padding = (0, columns * 128 - tensors[name].shape[1], 0, rows * 128 - tensors[name].shape[0])
            blocks = torch.nn.functional.pad(tensors[name].float(), padding).view(rows, 128, columns, 128)
            exponents = (blocks.abs().amax((1, 3)) / 448).log2().ceil()
            values = (blocks / torch.exp2(exponents).view(rows, 1, columns, 1)).view(rows * 128, columns * 128)
            tensors[f"{name}_scale_inv"] = encode((exponents + 127).to(torch.uint8))
            tensors[name] = values[: tensors[name].shape[0], : tensors[name].shape[1]].to(torch.float8_e4m3fn)

    return change


def as_float(exponents):
    return torch.exp2(exponents.float() - 127)


UE8M0 = {
    "float32": as_float,
    "float8_e8m0fnu": lambda exponents: exponents.view(torch.float8_e8m0fnu),
    "uint8": lambda exponents: exponents,
}


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_scales_that_are_powers_of_two_may_come_as_exponents(family, load, checkpoint, tmp_path):
    new = checkpoint(family, seed=SEED)
    folders = {kind: altered(new, tmp_path / kind, powers_of_two(encode)) for kind, encode in UE8M0.items()}
    first, *others = (load(family, "block", Update("tensor", folder)) for folder in folders.values())
    assert first.ranks[0].updates[0].success, first.ranks[0].updates[0].message
    sent = load_file(folders["float32"] / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    for each in (name, f"{name}_scale_inv"):
        assert first.ranks[0].tensors[each].sha256 == hash_of(sent[each])
    others.append(load(family, "block", Update("disk", folders["float8_e8m0fnu"])))
    others.append(load(family, "block", *(Update("bucket", folders[kind], calls=1) for kind in ("float32", "uint8"))))
    for other in others:
        assert [done.success for done in other.ranks[0].updates if not done.success] == []
        assert compare(first, other) == []


def test_exponents_that_are_sent_by_parameter_name_are_no_numbers(load, checkpoint, tmp_path):
    """Upstream copies them; as numbers, 120 would be 120 instead of 1/128."""
    new, names = checkpoint("qwen3", seed=SEED), "o_proj"
    folders = [altered(new, tmp_path / kind, powers_of_two(encode)) for kind, encode in UE8M0.items()]
    found = [load("qwen3", "block", Update("direct", folder, names=names)) for folder in folders]
    assert [result.ranks[0].updates[0].success for result in found] == [True] * 3
    by_checkpoint_name = load("qwen3", "block", Update("tensor", folders[0], names=names))
    assert [line for result in found for line in compare(by_checkpoint_name, result)] == []
    assert compare(load("qwen3", "block"), found[0]) != []


def test_scales_that_are_packed_for_deepgemm_are_refused_by_name(load, checkpoint, tmp_path):
    def packed(exponents):
        # Four to an int32, rows padded: its kernel's layout is [K / 512, N] with a scale for each row.
        return exponents.int().repeat_interleave(128, 0)

    folder = altered(checkpoint("qwen3", seed=SEED), tmp_path / "packed", powers_of_two(packed))
    refused(
        load("qwen3", "block", Update("tensor", folder), Update("direct", folder, names="o_proj")),
        *[["_proj.weight_scale_inv holds int32", "uint8, float8_e8m0fnu"]] * 2,
    )
