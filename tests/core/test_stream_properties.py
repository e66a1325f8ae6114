# SPDX-License-Identifier: Apache-2.0
"""Whatever the order, the split, the duplicates and the threads: the result is that of one-shot quantization.

With the quantizers of a load on the CPU, and with those on a GPU, whose kernels (here in torch) ask for whole units at
aligned addresses, and make other values of a row where there are few.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core import pipelined
from core.kernels import use_kernels
from core.streams import per_channel, per_expert, per_tensor
from core.test_stream import weight_of
from sglang_overlay.core.regions import slices

BUILDERS = {"per-tensor": per_tensor, "per-expert": per_expert, "per-channel": per_channel}


@pytest.fixture(scope="class")
def pipelined_streams():
    with pytest.MonkeyPatch.context() as patch:
        pipelined.use(patch)
        yield


@pytest.fixture(scope="class")
def kernels():
    with pytest.MonkeyPatch.context() as patch:
        use_kernels(patch)
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
    return kind, *draw(writes_of(shape))


@st.composite
def plans_for_kernels(draw):
    """Rows are of four columns or a multiple, and as many as a kernel for many rows takes, or fewer."""
    kind = draw(st.sampled_from(sorted(BUILDERS)))
    sizes = [st.integers(1, 3), st.integers(1, 6)] if kind == "per-expert" else [st.integers(1, 24)]
    return kind, *draw(writes_of((*map(draw, sizes), 4 * draw(st.integers(1, 4)))))


@st.composite
def writes_of(draw, shape):
    """A shape, parts that cover it in any order, some twice, and a seed."""
    parts = draw(splits(tuple((0, size) for size in shape)))
    duplicates = draw(st.lists(st.sampled_from(parts), max_size=3))
    return shape, draw(st.permutations(parts + duplicates)), draw(st.integers(0, 1 << 16))


def write_in_order(plan, from_checkpoint, weight_of=weight_of):
    """Write all parts, one after the other."""
    kind, shape, parts, seed = plan
    weight = weight_of(shape, seed)
    streamed = BUILDERS[kind](shape)
    if from_checkpoint:
        streamed.sources.offer(weight)
    with streamed.capture():
        for part in parts:
            streamed.placeholder.data[slices(part)].copy_(weight[slices(part)])
    assert_one_shot(streamed, weight)


def write_in_threads(plan, threads, weight_of=weight_of):
    """Write each part once, in one of several threads."""
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
    assert_one_shot(streamed, weight)


def assert_one_shot(streamed, weight):
    assert streamed.stream.settle() == []
    assert streamed.equals(weight)
    assert streamed.account.held == 0


def with_rows_of_zeros(shape, seed):
    """Of these upstream's two kernels for rows make different values."""
    weight = weight_of(shape, seed)
    return weight * (torch.rand(*shape[:-1], 1, generator=torch.Generator().manual_seed(seed)) > 0.2)


def examples(count):
    return settings(max_examples=count, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.usefixtures("pipelined_streams")
@examples(800)
@given(plans(), st.booleans())
def test_any_order_split_and_duplicate_gives_the_one_shot_result(plan, from_checkpoint):
    write_in_order(plan, from_checkpoint)


@pytest.mark.usefixtures("pipelined_streams")
@examples(200)
@given(plans(), st.integers(2, 4))
def test_threads_give_the_one_shot_result(plan, threads):
    write_in_threads(plan, threads)


@pytest.mark.usefixtures("kernels")
@examples(150)
@given(plans_for_kernels(), st.booleans())
def test_any_order_split_and_duplicate_gives_what_kernels_make_of_the_whole(plan, from_checkpoint):
    write_in_order(plan, from_checkpoint, with_rows_of_zeros)


@pytest.mark.usefixtures("kernels")
@examples(60)
@given(plans_for_kernels(), st.integers(2, 4))
def test_threads_give_what_kernels_make_of_the_whole(plan, threads):
    write_in_threads(plan, threads, with_rows_of_zeros)
