# SPDX-License-Identifier: Apache-2.0
"""Checkpoint tensors as a rank's weight loaders cut and write them: each rank ends with the one-shot result.

Layouts are tensor and expert parallel; tensors come in any order, some of them twice, cut whole or in rows, from mapped
memory or from a buffer that is used again, through one thread or several. What a rank should hold is put together
without the stream, from the same checkpoint.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import pipelined
from core.streams import per_channel, per_expert, per_tensor
from sglang_overlay.core.quantizers import units_not_finite


@pytest.fixture(autouse=True, scope="module")
def _pipelined():
    with pytest.MonkeyPatch.context() as patch:
        pipelined.use(patch)
        yield


RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Layout:
    """A rank's place.

    Attributes:
        tp, rank: tensor-parallel size, and the rank in it.
        ep, ep_rank: expert-parallel size, and the rank in it.
    """

    tp: int = 1
    rank: int = 0
    ep: int = 1
    ep_rank: int = 0

    def part(self, tensor, dim):
        """This rank's share of ``tensor`` along ``dim``."""
        size = tensor.shape[dim] // self.tp
        return tensor.narrow(dim, self.rank * size, size)

    def experts(self, count):
        """Global numbers of this rank's experts."""
        share = count // self.ep
        return range(self.ep_rank * share, (self.ep_rank + 1) * share)


@dataclass(frozen=True)
class Delivery:
    """How tensors reach the parameter.

    Attributes:
        order: positions of the loader calls in the order they are made; a position may come twice.
        threads: that make the calls.
        reuses_buffer: every tensor comes in memory that is overwritten when its loader has returned.
    """

    order: list[int] = field(default_factory=list)
    threads: int = 1
    reuses_buffer: bool = False


@st.composite
def layouts(draw):
    tp, ep = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    return Layout(tp, draw(st.integers(0, tp - 1)), ep, draw(st.integers(0, ep - 1)))


@st.composite
def deliveries(draw, calls):
    order = list(range(calls)) + draw(st.lists(st.integers(0, calls - 1), max_size=2))
    return Delivery(draw(st.permutations(order)), draw(st.sampled_from([1, 1, 2, 3])), draw(st.booleans()))


def tensor_of(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator).mul_(3).exp_()
    return (torch.randn(shape, generator=generator) * spread).to(torch.bfloat16)


@contextmanager
def quick_switches():
    """Let threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def deliver(streamed, calls, delivery):
    """Make ``calls``, each ``(tensor, loader)`` with ``loader(parameter, tensor)``, as ``delivery`` says."""

    capture = streamed.capture

    def call(position):
        tensor, loader = calls[position]
        source = tensor.clone() if delivery.reuses_buffer else tensor
        with capture():
            loader(streamed.placeholder.data, source)
        if delivery.reuses_buffer:
            source.fill_(1e4)

    if not delivery.reuses_buffer:
        for position, (tensor, _) in enumerate(calls):
            streamed.sources.offer(tensor, f"tensor {position}")
    with quick_switches(), ThreadPoolExecutor(delivery.threads) as pool:
        list(pool.map(call, delivery.order))


def assert_one_shot(streamed, weight):
    assert streamed.stream.settle() == []
    assert streamed.equals(weight)
    assert streamed.stream.rewritten == set()
    assert units_not_finite([streamed.stream.magnitudes])[0] == []
    assert streamed.account.held == 0


def into(index, start, size):
    """A loader that writes rows ``start`` to ``start + size`` of ``parameter[index]``."""
    return lambda parameter, tensor: parameter[index].narrow(0, start, size).copy_(tensor)


@st.composite
def expert_layers(draw):
    layout = draw(layouts())
    experts = layout.ep * draw(st.integers(1, 3))
    width, hidden = layout.tp * draw(st.integers(1, 4)), draw(st.integers(1, 6))
    fused = draw(st.booleans())
    mine = len(layout.experts(experts))
    return layout, (experts, width, hidden), fused, draw(deliveries(2 if fused else 2 * mine)), draw(st.integers(0, 99))


@settings(RELAXED, max_examples=500)
@given(expert_layers())
def test_gate_and_up_of_each_expert(case):
    layout, (experts, width, hidden), fused, delivery, seed = case
    gate, up = (tensor_of((experts, width, hidden), seed + shift) for shift in (0, 1))
    mine, share = layout.experts(experts), width // layout.tp
    weight = torch.cat([layout.part(gate, 1), layout.part(up, 1)], dim=1)[mine.start : mine.stop]
    streamed = per_expert(tuple(weight.shape))

    def of_one(slot, number, start):
        source = (gate if start == 0 else up)[number]
        return source, lambda parameter, tensor: into(slot, start, share)(parameter, layout.part(tensor, 0))

    def of_all(source, start):
        def load(parameter, tensor):
            parameter.narrow(1, start, share).copy_(layout.part(tensor[mine.start : mine.stop], 1))

        return source, load

    calls = [of_all(gate, 0), of_all(up, share)]
    if not fused:
        calls = [of_one(slot, number, start) for slot, number in enumerate(mine) for start in (0, share)]
    deliver(streamed, calls, delivery)
    assert_one_shot(streamed, weight)


@settings(RELAXED, max_examples=300)
@given(expert_layers(), st.booleans())
def test_down_of_each_expert(case, transposed):
    layout, (experts, width, hidden), fused, delivery, seed = case
    down = tensor_of((experts, width, hidden), seed) if transposed else tensor_of((experts, hidden, width), seed)
    upright = down.transpose(1, 2) if transposed else down
    mine = layout.experts(experts)
    weight = layout.part(upright, 2)[mine.start : mine.stop].contiguous()
    streamed = per_expert(tuple(weight.shape))

    def load(slots, numbers):
        return down[numbers], lambda parameter, tensor: parameter[slots].copy_(
            layout.part(tensor.transpose(-1, -2) if transposed else tensor, -1)
        )

    middle = mine.start + (len(mine) + 1) // 2
    halves = [slice(mine.start, middle), slice(middle, mine.stop)]
    calls = [load(slice(half.start - mine.start, half.stop - mine.start), half) for half in halves]
    if not fused:
        calls = [load(slot, number) for slot, number in enumerate(mine) for _ in range(2)]
    deliver(streamed, calls, delivery)
    assert_one_shot(streamed, weight)


@st.composite
def attention_layers(draw):
    layout = draw(layouts())
    size, hidden = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    heads = layout.tp * draw(st.integers(1, 2))
    kv_heads = draw(st.sampled_from([count for count in (1, 2, 4) if heads % count == 0 and count <= heads]))
    as_one = draw(st.booleans())
    padding = draw(st.integers(0, 2))
    calls = 1 + bool(padding) if as_one else 3 + bool(padding)
    return layout, (heads, kv_heads, size, hidden), as_one, padding, draw(deliveries(calls)), draw(st.integers(0, 99))


@settings(RELAXED, max_examples=400)
@given(attention_layers(), st.sampled_from([per_tensor, per_channel]))
def test_query_key_and_value_of_one_layer(case, build):
    layout, (heads, kv_heads, size, hidden), as_one, padding, delivery, seed = case
    query = tensor_of((heads * size, hidden), seed)
    key, value = (tensor_of((kv_heads * size, hidden), seed + shift) for shift in (1, 2))
    # Fewer key heads than ranks: each is held by several.
    kv_layout = layout if kv_heads >= layout.tp else Layout(kv_heads, layout.rank * kv_heads // layout.tp)
    cuts = [(query, layout), (key, kv_layout), (value, kv_layout)]
    parts = [place.part(tensor, 0) for tensor, place in cuts]
    weight = torch.cat([*parts, torch.zeros(padding, hidden, dtype=torch.bfloat16)])
    streamed = build(tuple(weight.shape))
    starts = [0, len(parts[0]), len(parts[0]) + len(parts[1])]

    def load_one(number):
        tensor, place = cuts[number]
        start, rows = starts[number], len(parts[number])
        return tensor, lambda parameter, given: parameter.narrow(0, start, rows).copy_(place.part(given, 0))

    def load_all(parameter, given):
        sections = given.split([len(tensor) for tensor, _ in cuts])
        for number, section in enumerate(sections):
            load_one(number)[1](parameter, section)

    def pad(parameter, _):
        parameter.narrow(0, len(weight) - padding, padding).zero_()

    calls = [(torch.cat([query, key, value]), load_all)] if as_one else [load_one(number) for number in range(3)]
    calls += [(torch.zeros(1), pad)] if padding else []
    deliver(streamed, calls, delivery)
    assert_one_shot(streamed, weight)


@settings(RELAXED, max_examples=100)
@given(expert_layers(), st.data())
def test_what_is_left_out_is_reported_and_zero(case, data):
    _, (experts, width, hidden), _, _, seed = case
    weight = tensor_of((experts, 2 * width, hidden), seed)
    calls = [(expert, half) for expert in range(experts) for half in (0, 1)]
    left_out = data.draw(st.sets(st.sampled_from(calls), min_size=1))
    order = data.draw(st.permutations([call for call in calls if call not in left_out]))
    streamed = per_expert(tuple(weight.shape))
    with streamed.capture():
        for expert, half in order:
            rows = slice(half * width, (half + 1) * width)
            streamed.placeholder.data[expert, rows].copy_(weight[expert, rows])
    for expert, half in left_out:
        weight[expert, half * width : (half + 1) * width] = 0
    assert streamed.stream.settle(zeros=True) == sorted({expert for expert, _ in left_out})
    assert streamed.equals(weight)
    assert streamed.account.held == 0
