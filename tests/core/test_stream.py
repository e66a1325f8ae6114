# SPDX-License-Identifier: Apache-2.0
"""However a weight is written, the result is that of quantizing it in one go."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from core.streams import one_scale, per_channel, per_expert, per_expert_by_kernel, per_tensor, streamed
from sglang_overlay.core import stream
from sglang_overlay.core.errors import (
    ConflictingWriteError,
    LayerNotStreamableError,
    UnsupportedDtypeError,
    UnsupportedWriteError,
)
from sglang_overlay.core.quantizers import units_not_finite
from sglang_overlay.core.units import UnitGrid


def weight_of(shape, seed=0, dtype=torch.bfloat16):
    """Values whose magnitude differs per unit and per row, so that a swapped slice or a shared scale shows."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    spread = torch.randn(*shape[:-1], 1, generator=generator).mul_(3).exp_()
    return (values * spread).to(dtype)


def is_untouched(streamed):
    return streamed.stream.settle() == list(range(streamed.stream.units)) and streamed.account.peak == 0


def test_two_threads_may_complete_the_same_unit_again_and_again():
    shape = (2, 8, 16)
    weight = weight_of(shape)
    streamed = per_expert(shape)
    streamed.sources.offer(weight)
    halves = [(slice(0, 2), slice(0, 4)), (slice(0, 2), slice(4, 8))]

    def write(seed):
        chance = random.Random(seed)
        with streamed.capture():
            for _ in range(100):
                half = chance.choice(halves)
                streamed.placeholder.data[half].copy_(weight[half])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    with streamed.capture():
        streamed.placeholder.data.copy_(weight)
    assert streamed.stream.settle() == []
    assert streamed.equals(weight)
    assert streamed.account.held == 0


@pytest.mark.parametrize("cuts", [(3, 21), (5, 32), (8, 27), (1, 2, 9, 31)])
def test_runs_of_rows_may_begin_and_end_within_units(cuts):
    weight = weight_of((4, 8, 16))
    streamed = per_expert((4, 8, 16))
    rows = [slice(*pair) for pair in pairwise((0, *cuts, 32)) if pair[0] < pair[1]]
    with streamed.capture():
        for run in rows:
            streamed.placeholder.data.view(32, 16)[run].copy_(weight.view(32, 16)[run])
    assert streamed.stream.settle() == []
    assert streamed.equals(weight)
    assert streamed.account.held == 0


@pytest.mark.parametrize("cuts", [(), (8,), (5,), (3, 12)])
def test_several_experts_of_several_units_may_be_written_at_once(cuts):
    weight = weight_of((2, 16, 16))
    found = streamed((2, 16, 16), UnitGrid(4, (8, 16), sliced=True), one_scale(), (4,))
    with found.capture():
        for start, stop in pairwise((0, *cuts, 16)):
            found.placeholder.data[:, start:stop].copy_(weight[:, start:stop])
    assert found.stream.settle() == []
    assert found.equals(weight.view(4, 8, 16))
    assert found.account.held == 0


def test_expert_unit_waits_for_both_shards():
    weight = weight_of((3, 4, 8))
    streamed = per_expert((3, 4, 8))
    with streamed.capture():
        streamed.placeholder.data[1].narrow(0, 0, 2).copy_(weight[1, :2])
        assert streamed.stream.done_units == 0
        assert streamed.account.held == 2 * 8 * 2
        streamed.placeholder.data[1].narrow(0, 2, 2).copy_(weight[1, 2:])
    assert streamed.account.held == 0
    assert streamed.stream.settle() == [0, 2]
    assert streamed.account.peak == 2 * 8 * 2
    assert streamed.stream.done_units == 1


def test_piece_waits_where_it_came_from():
    """What is scarce is memory of the device that the results are on."""
    streamed = per_expert((2, 4, 8))
    stored = streamed.stream.storage
    streamed.stream.storage = stream.Storage(stored.weight.to("meta"), stored.scale.to("meta"))
    with streamed.capture():
        streamed.placeholder.data[0, :2].copy_(weight_of((2, 8)))
    ((piece,),) = (staged.pieces for staged in streamed.stream._staged.values())
    assert piece.values.device.type == "cpu"


def test_unit_that_comes_whole_needs_no_staging():
    weight = weight_of((3, 4, 8))
    streamed = per_expert((3, 4, 8))
    with streamed.capture():
        streamed.placeholder.data.copy_(weight)
    assert streamed.equals(weight)
    assert streamed.account.peak == 0
    assert streamed.stream.direct_units == 3


def test_padding_counts_as_written():
    # Upstream pads with zero_() (narrow_padded_param_and_loaded_weight) and with fill_().
    weight = weight_of((6, 8))
    weight[4:] = 0
    streamed = per_tensor((6, 8))
    with streamed.capture():
        streamed.placeholder.data.narrow(0, 4, 1).zero_()
        streamed.placeholder.data.narrow(0, 5, 1).fill_(0)
        streamed.placeholder.data.narrow(0, 0, 4).copy_(weight[:4])
    assert streamed.equals(weight)


def test_last_write_wins_within_a_unit():
    weight, wrong = weight_of((4, 8)), weight_of((4, 8), seed=1)
    streamed = per_tensor((4, 8))
    with streamed.capture():
        streamed.placeholder.data[0:3].copy_(wrong[0:3])
        streamed.placeholder.data[1:2].copy_(weight[1:2])
        streamed.placeholder.data[:, 0:4][0].copy_(weight[0, :4])
        streamed.placeholder.data[0, 4:].copy_(weight[0, 4:])
        streamed.placeholder.data[2:4].copy_(weight[2:4])
    assert streamed.equals(weight)
    assert streamed.account.held == 0


def test_clearing_first_and_writing_afterwards_is_not_complete_too_early():
    weight = weight_of((2, 6, 8))
    weight[:, 5:] = 0
    streamed = per_expert((2, 6, 8))
    with streamed.capture():
        streamed.placeholder.data.zero_()
        streamed.placeholder.data[:, :3].copy_(weight[:, :3])
        streamed.placeholder.data[:, 3:5].copy_(weight[:, 3:5])
    assert streamed.stream.settle() == []
    assert streamed.equals(weight)
    assert streamed.account.held == 0


def test_unit_that_is_only_cleared_is_quantized_at_the_end():
    streamed = per_expert((2, 6, 8))
    with streamed.capture():
        streamed.placeholder.data.zero_()
    assert streamed.stream.done_units == 0
    assert streamed.stream.settle() == []
    assert streamed.equals(torch.zeros(2, 6, 8, dtype=torch.bfloat16))


def test_part_that_comes_again_with_other_values_is_an_error():
    weight = weight_of((4, 8))
    streamed = per_tensor((4, 8))
    with streamed.capture():
        streamed.placeholder.data.copy_(weight)
        streamed.placeholder.data[:2].copy_(weight[:2] * 2)
    with pytest.raises(ConflictingWriteError, match="twice"):
        streamed.stream.settle()


@pytest.mark.parametrize("largest", [1.53, 1.47])
def test_part_that_comes_again_with_another_largest_value_is_an_error(largest):
    """Its values have the same fp8 values under the scale that is there; stock would make another scale."""
    weight = torch.linspace(0.1, 1, 32).view(4, 8).to(torch.bfloat16)
    weight[3, 7] = 1.5
    streamed = per_tensor((4, 8))
    with streamed.capture():
        streamed.placeholder.data.copy_(weight)
        weight[3, 7] = largest
        streamed.placeholder.data[2:].copy_(weight[2:])
    with pytest.raises(ConflictingWriteError, match="twice"):
        streamed.stream.settle()


def test_source_may_be_overwritten_after_the_loader_returns():
    weight = weight_of((4, 8))
    streamed = per_tensor((4, 8))
    with streamed.capture():
        for row in range(4):
            buffer = weight[row].clone()
            streamed.placeholder.data[row].copy_(buffer)
            buffer.fill_(1e6)
    assert streamed.equals(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_other_checkpoint_dtypes_are_cast_as_stock_casts_them(dtype):
    weight = weight_of((4, 8), dtype=torch.float64).clamp_(-1e4, 1e4).to(dtype)
    streamed = per_tensor((4, 8))
    with streamed.capture():
        streamed.placeholder.data[:2].copy_(weight[:2])
        streamed.placeholder.data[2:].copy_(weight[2:])
    assert streamed.equals(weight.to(torch.bfloat16))


def test_transposed_write_lands_where_it_belongs():
    weight = weight_of((4, 8))
    streamed = per_tensor((4, 8))
    with streamed.capture():
        streamed.placeholder.data.t().copy_(weight.t().contiguous())
    assert streamed.equals(weight)


def test_broadcast_write_is_expanded():
    row = weight_of((1, 8))
    streamed = per_tensor((4, 8))
    with streamed.capture():
        streamed.placeholder.data.copy_(row)
    assert streamed.stream.settle() == []
    assert streamed.equals(row.expand(4, 8))


def test_scalar_assignment_keeps_its_value():
    streamed = per_tensor((4, 8))
    with streamed.capture():
        streamed.placeholder.data[:, 0:4] = 3.0
        streamed.placeholder.data[:, 4:] = 0.5
    assert streamed.stream.settle() == []
    weight = torch.full((4, 8), 0.5, dtype=torch.bfloat16)
    weight[:, :4] = 3.0
    assert streamed.equals(weight)


def test_empty_write_is_no_write():
    streamed = per_tensor((4, 8))
    with streamed.capture():
        streamed.placeholder.data.narrow(0, 4, 0).copy_(torch.zeros_like(streamed.placeholder.data.narrow(0, 4, 0)))
    assert is_untouched(streamed)


@pytest.mark.parametrize(
    "touch",
    [
        pytest.param(lambda data: data.mul_(2), id="changed in place"),
        pytest.param(lambda data: data.__setitem__(torch.tensor([0, 2]), torch.ones(2, 8)), id="indexed by a tensor"),
        pytest.param(lambda data: data.sum().item(), id="read"),
        pytest.param(lambda data: torch.empty(4, 8).copy_(data), id="copied out"),
        pytest.param(lambda data: data.copy_(torch.empty(4, 8, device="meta")), id="written from nothing"),
        pytest.param(lambda data: torch.add(data, 1, out=data), id="given as out"),
        pytest.param(lambda data: data[:, ::2].copy_(torch.ones(4, 4)), id="written with a step"),
        pytest.param(lambda data: torch._foreach_copy_([data], [torch.ones(4, 8)]), id="copied to in a list"),
        pytest.param(lambda data: torch.cat([data, torch.ones(4, 8, dtype=data.dtype)]), id="joined with another"),
        pytest.param(
            lambda data: data.view(torch.int16).copy_(torch.ones(4, 8, dtype=torch.int16)), id="written as bits"
        ),
        pytest.param(lambda data: data.view(torch.half).copy_(torch.ones(4, 8)), id="written as another dtype"),
    ],
)
def test_what_cannot_be_captured_is_refused(touch):
    streamed = per_tensor((4, 8))
    with streamed.capture(), pytest.raises(UnsupportedWriteError):
        touch(streamed.placeholder.data)
    assert is_untouched(streamed)


def test_other_tensors_are_left_alone():
    streamed = per_tensor((4, 8))
    with streamed.capture():
        other = torch.empty(4, 8, device="meta")
        other.copy_(torch.ones(4, 8))
        real = torch.zeros(4, 8)
        real[1] = 2.0
    assert is_untouched(streamed)
    assert real.sum() == 16


def test_restore_gives_back_what_was_written():
    weight = weight_of((3, 4, 8))
    streamed = per_expert((3, 4, 8))
    with streamed.capture():
        streamed.placeholder.data[0, :2].copy_(weight[0, :2])
        streamed.placeholder.data[2, 1:].copy_(weight[2, 1:])
    restored = streamed.stream.restore()
    assert torch.equal(restored[0, :2], weight[0, :2])
    assert torch.equal(restored[2, 1:], weight[2, 1:])
    assert streamed.account.held == 0


def test_restore_refuses_once_a_unit_is_quantized():
    streamed = per_expert((3, 4, 8))
    with streamed.capture():
        streamed.placeholder.data[1].copy_(weight_of((4, 8)))
    with pytest.raises(LayerNotStreamableError, match="1 of 3 units"):
        streamed.stream.restore()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_integers_are_refused_and_the_tensor_is_named(dtype):
    tensor = torch.ones(4, 8).to(dtype)
    streamed = per_tensor((4, 8))
    streamed.sources.offer(tensor, "packed.qweight")
    with (
        streamed.capture(),
        pytest.raises(UnsupportedDtypeError, match=rf"layer\.weight .* packed\.qweight .* {dtype}"),
    ):
        streamed.placeholder.data.copy_(tensor)
    assert streamed.stream.settle() == [0]


def test_integer_that_fills_is_no_tensor_of_integers():
    streamed = per_tensor((4, 8))
    with streamed.capture():
        streamed.placeholder.data[:, 0:4] = 3
        streamed.placeholder.data[:, 4:].fill_(torch.tensor(2))
    assert streamed.stream.settle() == []
    assert streamed.equals(torch.tensor([3.0] * 4 + [2.0] * 4, dtype=torch.bfloat16).expand(4, 8))


@pytest.mark.parametrize(("factor", "named"), [(1, []), (2, ["again"])])
@pytest.mark.parametrize("parts", [1, 2])
def test_unit_that_comes_again_with_other_values_is_noted(parts, factor, named):
    weight = weight_of((2, 4, 8))
    again = weight * factor
    streamed = per_expert((2, 4, 8))
    streamed.sources.offer(again, "again")
    with streamed.capture():
        for source in (weight, again):
            for rows in torch.arange(4).chunk(parts):
                part = slice(int(rows[0]), int(rows[-1]) + 1)
                streamed.placeholder.data[:, part].copy_(source[:, part])
    assert streamed.stream.settle() == []
    assert streamed.equals(again)
    assert sorted(streamed.stream.rewritten) == named


@pytest.mark.parametrize(("factor", "named"), [(1, []), (2, ["again"])])
@pytest.mark.parametrize("rows", [1, 2, 4], ids=["some rows", "half", "the whole unit"])
def test_part_that_comes_again_before_its_unit_is_whole_is_noted(rows, factor, named):
    weight = weight_of((2, 4, 8))
    again = weight * factor
    streamed = per_expert((2, 4, 8))
    streamed.sources.offer(again, "again")
    with streamed.capture():
        for source, part in ((weight, slice(2)), (again, slice(rows)), (weight, slice(rows, 4))):
            streamed.placeholder.data[:, part].copy_(source[:, part])
    assert streamed.stream.settle() == []
    assert streamed.equals(torch.cat([again[:, :rows], weight[:, rows:]], dim=1))
    assert sorted(streamed.stream.rewritten) == named


def test_nan_that_comes_again_is_no_other_value():
    weight = weight_of((2, 4, 8))
    weight[0, 0, 0] = torch.nan
    streamed = per_expert((2, 4, 8))
    with streamed.capture():
        for part in (slice(2), slice(2), slice(2, 4)):
            streamed.placeholder.data[:, part].copy_(weight[:, part])
    assert streamed.stream.settle() == []
    assert not streamed.stream.rewritten


def test_zeros_that_are_filled_in_before_or_after_are_no_other_values():
    weight = weight_of((2, 4, 8))
    streamed = per_expert((2, 4, 8))
    with streamed.capture():
        streamed.placeholder.data.zero_()
        streamed.placeholder.data[:, :3].copy_(weight[:, :3])
        streamed.placeholder.data[:, 2:].zero_()
    streamed.stream.settle()
    assert not streamed.stream.rewritten


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("build", [per_expert_by_kernel, per_expert, per_channel])
@pytest.mark.parametrize("parts", [1, 2])
def test_unit_with_a_value_that_is_not_finite_is_noted(parts, build, value):
    shape = (4, 8) if build is per_channel else (4, 2, 8)
    weight = weight_of(shape)
    weight[2].view(-1)[3] = value
    streamed = build(shape)
    with streamed.capture():
        for columns in torch.arange(8).chunk(parts):
            part = slice(int(columns[0]), int(columns[-1]) + 1)
            streamed.placeholder.data[..., part].copy_(weight[..., part])
    assert streamed.stream.settle() == []
    assert units_not_finite([streamed.stream.magnitudes])[0] == [2]


def test_largest_finite_values_are_finite():
    weight = torch.full((2, 4, 8), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    weight[:, :2] *= -1
    streamed = per_expert((2, 4, 8))
    with streamed.capture():
        streamed.placeholder.data.copy_(weight)
    assert streamed.stream.settle() == []
    assert units_not_finite([streamed.stream.magnitudes])[0] == []


def test_units_know_the_tensors_they_came_from():
    weight = weight_of((2, 4, 8))
    streamed = per_expert((2, 4, 8))
    tensors = {(expert, half): weight[expert, 2 * half : 2 * half + 2].clone() for expert in (0, 1) for half in (0, 1)}
    with streamed.capture():
        for (expert, half), tensor in tensors.items():
            streamed.sources.offer(tensor, f"{expert}.{'gate' if half == 0 else 'up'}")
            streamed.placeholder.data[expert, 2 * half : 2 * half + 2].copy_(tensor)
    assert streamed.stream.origins([1]) == ["1.gate", "1.up"]
    assert streamed.stream.origins() == ["0.gate", "0.up", "1.gate", "1.up"]


def test_units_that_were_not_written_stay_as_they_are():
    """An update may bring some units only."""
    weight = weight_of((3, 4, 8))
    streamed = per_expert((3, 4, 8))
    stored = streamed.stream.storage
    stored.weight.fill_(2.0)
    stored.scale.fill_(0.5)
    with streamed.capture():
        streamed.placeholder.data[1].copy_(weight[1])
        streamed.placeholder.data[2, :2].copy_(weight[2, :2])
    assert streamed.stream.settle() == [0, 2]
    for untouched in (0, 2):
        assert (stored.weight[untouched].float() == 2.0).all()
        assert stored.scale[untouched] == 0.5
    assert streamed.account.held == 0


def test_experts_of_one_tensor_are_put_on_the_device_a_few_at_a_time(monkeypatch):
    monkeypatch.setattr(stream, "MOST_AT_ONCE", 2 * 4 * 8)
    streamed, weight = per_expert((5, 4, 8)), torch.randn(5, 4, 8).to(torch.bfloat16)
    sizes = []
    on_device = streamed.stream._on_device
    monkeypatch.setattr(streamed.stream, "_on_device", lambda values: sizes.append(len(values)) or on_device(values))
    streamed.stream.write(streamed.placeholder, weight)
    assert sizes == [2, 2, 1]
    assert streamed.stream.settle() == []
    assert streamed.equals(weight)


def test_unit_without_elements_is_not_missing():
    assert per_expert((3, 0, 8)).stream.settle() == []
