# SPDX-License-Identifier: Apache-2.0
"""What quantizing costs on a device: operations of experts and linear layers, on fake tensors of device cuda."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from core.operations import operations
from core.streams import make_parameter, make_sources
from torch._subclasses.fake_tensor import FakeTensorMode

from sglang_overlay.core.checkpoint_stream import CheckpointStream
from sglang_overlay.core.sources import CheckpointSources
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.schemes import registry, rows_over_ranks
from sglang_overlay.schemes.scheme import LayerKind
from sglang_overlay.schemes.stock_experts import ExpertsPlan
from sglang_overlay.schemes.stock_linear import LinearPlan

CUDA = torch.device("cuda", 0)
FP8 = torch.float8_e4m3fn

EXPERTS = {
    "DeepSeek-V3": (7168, 2048),
    "DeepSeek-V3 at TP 8": (7168, 256),
    "Qwen3-235B": (4096, 1536),
    "Qwen3-235B at TP 8": (4096, 192),
    "Qwen3-30B": (2048, 768),
    "Mixtral-8x22B": (6144, 16384),
    "no multiple of 128": (1000, 200),
    "tiny": (64, 32),
}
"""Hidden size, and an expert's intermediate size on one rank."""
COUNT = 4

MOST_AN_EXPERT = 30
MOST_A_UNIT = 14


def scaled_fp8_quant(unit):
    """As many launches as ``scaled_fp8_quant`` of ``fp8_kernel.py`` (0.5.23): zeros, absmax, values."""
    values, scale = torch.empty(unit.shape, dtype=FP8, device=unit.device), torch.zeros(1, device=unit.device)
    scale.add_(1)
    return values.zero_(), scale


def row_kernel(rows, group_size):
    """As many launches as ``per_token_group_quant_fp8`` of whole rows (0.5.17 to 0.5.22): one."""
    assert rows.shape[-1] == group_size
    values = torch.empty(rows.shape, dtype=FP8, device=rows.device)
    return values.zero_(), torch.empty(len(rows), 1, device=rows.device)


def row_kernel_in_place(rows, group_size, *, output_q=None, output_s=None):
    """That of 0.5.23."""
    if output_q is None:
        return row_kernel(rows, group_size)
    return output_q.zero_(), output_s


@pytest.fixture(autouse=True, params=[row_kernel, row_kernel_in_place])
def on_cuda(request, monkeypatch):
    from sglang.srt.layers.quantization import fp8

    monkeypatch.setattr(fp8, "scaled_fp8_quant", scaled_fp8_quant)
    monkeypatch.setattr(fp8, "per_token_group_quant_fp8", request.param)
    with FakeTensorMode():
        yield


def serialized_layer(scheme, hidden, intermediate, ranks=1):
    """An expert layer as upstream creates it for a checkpoint of the scheme."""
    layer = torch.nn.Module()
    layer.intermediate_size_per_partition = intermediate
    layer.moe_tp_size = ranks
    dtype = torch.int8 if scheme == "int8" else FP8
    for name, rows, columns in (("w13_weight", 2 * intermediate, hidden), ("w2_weight", hidden, intermediate)):
        layer.register_parameter(name, make_parameter(torch.empty(COUNT, rows, columns, dtype=dtype, device=CUDA)))
        blocks = (-(-rows // 128), -(-columns // 128)) if scheme == "block" else (rows, 1)
        scale = make_parameter(torch.empty(COUNT, *blocks, device=CUDA))
        layer.register_parameter(f"{name}_scale{'_inv' if scheme == 'block' else ''}", scale)
    return layer


def streams_of(plan, placeholders):
    found = {}
    for name, placeholder in placeholders.items():
        parameter = plan.parameter(name, placeholder, plan.allocate(name, placeholder, CUDA))
        arguments = (parameter.grid, parameter.quantizer, parameter.storage, StagingAccount(), make_sources())
        found[name] = CheckpointStream(name, placeholder, *arguments), placeholder
    return found


def streams_of_experts(scheme, hidden, intermediate):
    plan = ExpertsPlan() if scheme == "stock" else registry.find(scheme).plan(LayerKind.EXPERTS, None)
    if scheme not in ("stock", "tensor"):
        layer = serialized_layer(scheme, hidden, intermediate)
        return streams_of(plan, plan.create(lambda: None, layer, torch.bfloat16).parameters)
    shapes = {"w13_weight": (COUNT, 2 * intermediate, hidden), "w2_weight": (COUNT, hidden, intermediate)}
    return streams_of(plan, {name: placeholder_of(shape) for name, shape in shapes.items()})


def placeholder_of(shape):
    return make_parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))


@dataclass(frozen=True)
class Part:
    """A checkpoint tensor, and the rows of an expert's matrix that it is loaded into."""

    name: str
    rows: range
    values: torch.Tensor


def checkpoint_expert(hidden, intermediate, pieces=1):
    """Gate, up and down of an expert, each in so many tensors in host memory."""
    projections = (
        ("w13_weight", range(intermediate), hidden),
        ("w13_weight", range(intermediate, 2 * intermediate), hidden),
        ("w2_weight", range(hidden), intermediate),
    )
    for name, rows, columns in projections:
        for number in range(pieces):
            part = rows[len(rows) * number // pieces : len(rows) * (number + 1) // pieces]
            yield Part(name, part, torch.empty(len(part), columns, dtype=torch.bfloat16))


def load_expert(streams, number, parts):
    """As ``FusedMoE``'s loader."""
    for part in parts:
        stream, placeholder = streams[part.name]
        stream.write(placeholder[number].narrow(0, part.rows[0], len(part.rows)), part.values)


def an_expert(scheme, sizes, pieces=1):
    """Operations of a layer's second expert: what is done once for a layer has been done by then."""
    streams = streams_of_experts(scheme, *sizes)
    first, second = (list(checkpoint_expert(*sizes, pieces)) for _ in range(2))
    load_expert(streams, 0, first)
    seen = operations(lambda: load_expert(streams, 1, second))
    assert all(stream.done_units * COUNT == stream.units * 2 for stream, _ in streams.values())
    return seen


@pytest.mark.parametrize("sizes", EXPERTS)
@pytest.mark.parametrize("scheme", ["block", "channel", "int8", "tensor", "stock"])
def test_expert_takes_few_operations_at_any_size(scheme, sizes):
    found = an_expert(scheme, EXPERTS[sizes])
    assert found.total <= (2 * MOST_A_UNIT if scheme in ("tensor", "stock") else MOST_AN_EXPERT), found.seen
    assert (found.uploads, found.waits) == (3, 0)


@pytest.mark.parametrize("scheme", ["block", "channel", "int8", "tensor", "stock"])
def test_expert_in_more_pieces_takes_a_few_more(scheme):
    """A projection in two tensors, as no loader brings it: the first waits, and both are put together."""
    found = an_expert(scheme, EXPERTS["DeepSeek-V3"], 2)
    assert found.total <= MOST_AN_EXPERT + 5 * 3, found.seen
    assert (found.uploads, found.waits) == (6, 0)


@pytest.mark.parametrize("scheme", ["channel", "int8"])
def test_down_projection_split_over_ranks_uploads_a_scale_a_row_more_and_no_other_columns(scheme):
    hidden, intermediate = EXPERTS["DeepSeek-V3 at TP 8"]
    plan = registry.find(scheme).plan(LayerKind.EXPERTS, None)
    layer = serialized_layer(scheme, hidden, intermediate, ranks=8)
    layer.w2_weight.weight_loader = lambda param, given, expert: stream.write(param[expert], given.chunk(8, 1)[3])
    placeholder = plan.create(lambda: None, layer, torch.bfloat16).parameters["w2_weight"]
    parameter = plan.parameter("w2_weight", placeholder, plan.allocate("w2_weight", placeholder, CUDA))
    stream = CheckpointStream(
        "w2_weight", placeholder, parameter.grid, parameter.quantizer, parameter.storage, StagingAccount(),
        CheckpointSources(), rows=rows_over_ranks.of(parameter),
    )  # fmt: skip
    whole = torch.empty(hidden, 8 * intermediate, dtype=torch.bfloat16)

    placeholder.weight_loader(placeholder, whole, 0)
    found = operations(lambda: placeholder.weight_loader(placeholder, whole, 1))
    assert stream.done_units * COUNT == stream.units * 2
    on_device = found.total - found.seen["aten.bitwise_and.Scalar"] - found.seen["aten.amax.default"]
    assert on_device <= MOST_A_UNIT + 5, found.seen
    assert (found.uploads, found.waits) == (2, 0)


LINEAR = {"o_proj": (7168, [16384]), "qkv_proj": (4096, [4096, 512, 512]), "gate_up_proj": (1000, [200, 200])}
"""Columns, and rows of each part that comes alone."""


def linear_parts(layer, **plan):
    """Operations for each part of a linear layer, in order."""
    columns, parts = LINEAR[layer]
    placeholder = placeholder_of((sum(parts), columns))
    ((stream, _),) = streams_of(LinearPlan(**plan), {"weight": placeholder}).values()
    sources = [torch.empty(rows, columns, dtype=torch.bfloat16) for rows in parts]
    targets = placeholder.split(parts)
    return [operations(partial(stream.write, *pair)) for pair in zip(targets, sources, strict=True)]


@pytest.mark.parametrize("layer", LINEAR)
def test_linear_layer_per_channel_takes_few_operations_a_part(layer):
    first, *others = linear_parts(layer, per_channel=True)
    # Once a layer of several parts, upstream is asked what it makes of zeros.
    assert first.total <= MOST_A_UNIT + 5
    for part in others:
        assert part.total <= MOST_A_UNIT, part.seen
    assert {(part.uploads, part.waits) for part in (first, *others)} == {(1, 0)}


@pytest.mark.parametrize("layer", LINEAR)
def test_linear_layer_per_tensor_takes_few_operations_beside_upstreams(layer):
    from sglang.srt.layers.quantization import fp8

    upstreams = operations(lambda: fp8.input_to_float8(torch.empty(64, 64, dtype=torch.bfloat16, device=CUDA)))
    parts = linear_parts(layer, per_channel=False)
    assert sum(part.total for part in parts) - upstreams.total <= MOST_A_UNIT
    # The first parts wait on the host for the last one.
    assert sum(part.uploads for part in parts) == len(parts)
    assert not any(part.waits for part in parts)
