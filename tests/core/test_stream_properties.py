# SPDX-License-Identifier: Apache-2.0
"""Whatever the order, the split, the duplicates and the threads: the result is that of one-shot quantization."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import pipelined
from core.streams import per_channel, per_expert, per_tensor
from core.test_stream import weight_of
from sglang_overlay.core.regions import slices

BUILDERS = {"per-tensor": per_tensor, "per-expert": per_expert, "per-channel": per_channel}


@pytest.fixture(autouse=True, scope="module")
def _pipelined():
    with pytest.MonkeyPatch.context() as patch:
        pipelined.use(patch)
        yield


@st.composite
def splits(draw, box):
    """Disjoint boxes that together are ``box``."""
    axis = draw(st.integers(0, len(box) - 1))
    start, stop = box[axis]
    if stop - start < 2 or not draw(st.booleans()):
        return [box]
    cut = draw(st.integers(start + 1, stop - 1))
    low = (*box[:axis], (start, cut), *box[axis + 1 :])
    high = (*box[:axis], (cut, stop), *box[axis + 1 :])
    return draw(splits(low)) + draw(splits(high))


@st.composite
def plans(draw):
    kind = draw(st.sampled_from(sorted(BUILDERS)))
    rank = 3 if kind == "per-expert" else 2
    shape = tuple(draw(st.integers(1, 6)) for _ in range(rank))
    parts = draw(splits(tuple((0, size) for size in shape)))
    duplicates = draw(st.lists(st.sampled_from(parts), max_size=3))
    return kind, shape, draw(st.permutations(parts + duplicates)), draw(st.integers(0, 1 << 16))


@settings(max_examples=800, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans(), st.booleans())
def test_any_order_split_and_duplicate_gives_the_one_shot_result(plan, from_checkpoint):
    kind, shape, parts, seed = plan
    weight = weight_of(shape, seed)
    streamed = BUILDERS[kind](shape)
    if from_checkpoint:
        streamed.sources.offer(weight)
    with streamed.capture():
        for part in parts:
            streamed.placeholder.data[slices(part)].copy_(weight[slices(part)])
    assert streamed.stream.settle() == []
    assert streamed.equals(weight)
    assert streamed.account.held == 0


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(plans(), st.integers(2, 4))
def test_threads_give_the_one_shot_result(plan, threads):
    kind, shape, parts, seed = plan
    parts = list(dict.fromkeys(parts))
    weight = weight_of(shape, seed)
    streamed = BUILDERS[kind](shape)
    barrier = threading.Barrier(threads)

    def write(mine):
        barrier.wait()
        with streamed.capture():
            for part in mine:
                streamed.placeholder.data[slices(part)].copy_(weight[slices(part)])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, [parts[index::threads] for index in range(threads)]))
    assert streamed.stream.settle() == []
    assert streamed.equals(weight)
    assert streamed.account.held == 0
