# SPDX-License-Identifier: Apache-2.0
"""A parameter that holds some columns has the values and scales that these have in whole rows."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from core import pipelined, streams
from core.streams import FP8, quantize_rows, same_bytes
from sglang_overlay.core.capture import storage_key
from sglang_overlay.core.captured_views import capture_of
from sglang_overlay.core.checkpoint_stream import CheckpointStream
from sglang_overlay.core.quantizers import RowQuantizer
from sglang_overlay.core.sources import CheckpointSources
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.core.stream import ParameterStream, Storage
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.core.whole_rows import LoadedTensor, WholeRows, WholeRowsQuantizer, row_magnitudes

RANKS = 4


@dataclass
class Split:
    """One rank's columns of ``[..., rows, columns]``, streamed in units of some rows."""

    stream: ParameterStream
    rows: WholeRows
    placeholder: torch.nn.Parameter
    loaded: LoadedTensor
    rank: int

    @classmethod
    def of(cls, shape, rows_a_unit, rank=1, kind=CheckpointStream, sources=CheckpointSources, **options):
        *others, columns_here = (*shape[:-1], shape[-1] // RANKS)
        shape = (*others, columns_here)
        unit = (rows_a_unit, columns_here) if rows_a_unit else (columns_here,)
        grid = UnitGrid(torch.Size(others).numel() // (rows_a_unit or 1), unit, sliced=True)
        placeholder = streams.make_parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        scales = torch.zeros(grid.parameter_shape[:-1])
        storage = Storage(torch.zeros(grid.parameter_shape, dtype=FP8), scales)
        loaded = LoadedTensor()
        rows = WholeRows(loaded, columns_here * RANKS, grid, torch.bfloat16)
        quantizer = WholeRowsQuantizer(RowQuantizer(quantize_rows), rows, scales)
        stream = kind(
            "layer.weight", placeholder, grid, quantizer, storage, StagingAccount(), sources(),
            executor=pipelined.EXECUTOR, rows=rows, **options,
        )  # fmt: skip
        return cls(stream, rows, placeholder, loaded, rank)

    def load(self, weight, write):
        """Call a loader with ``weight``, which ``write`` loads into the parameter."""
        with capture_of([self.placeholder], {storage_key(self.placeholder): self.stream})():
            self.loaded.wrap(lambda param, given: write(param, given))(self.placeholder, weight)

    def narrow(self, given, dim=-1):
        return given.chunk(RANKS, dim)[self.rank]

    def equals(self, weight):
        """Whether the result is this rank's part of ``weight``, quantized whole."""
        values, scales = quantize_rows(weight.reshape(-1, weight.shape[-1]))
        storage = self.stream.storage
        return same_bytes(storage.weight.flatten(), self.narrow(values).flatten()) and same_bytes(
            storage.scale.flatten(), scales.flatten()
        )


def weight_of(*shape):
    """Rows of which the largest value is in another rank's columns, mostly."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


@pytest.mark.parametrize("rows_a_unit", [0, 4, 12])
def test_matrix_in_one_call(rows_a_unit):
    split, weight = Split.of((12, 64), rows_a_unit), weight_of(12, 64)
    split.load(weight, lambda param, given: param.data.copy_(split.narrow(given)))
    assert split.stream.settle() == []
    assert split.equals(weight)
    assert not split.rows.is_narrowed


@pytest.mark.parametrize("rank", range(RANKS))
def test_expert_by_expert_with_copies_of_what_was_narrowed(rank):
    """As ``_maybe_copy_weight_view_before_h2d`` makes them."""
    split, weight = Split.of((3, 12, 64), 4, rank), weight_of(3, 12, 64)
    for expert in (2, 0, 1):
        split.load(
            weight[expert], lambda param, given, at=expert: param.data[at].copy_(split.narrow(given).contiguous())
        )
    assert split.stream.settle() == []
    assert split.equals(weight)


def test_experts_at_once_of_which_a_rank_has_some():
    split, weight = Split.of((2, 12, 64), 12), weight_of(6, 12, 64)
    split.load(weight, lambda param, given: param.data.copy_(split.narrow(given.narrow(0, 3, 2))))
    assert split.stream.settle() == []
    assert split.equals(weight[3:5])


def test_experts_stored_as_columns_by_rows():
    split, weight = Split.of((3, 12, 64), 4), weight_of(3, 12, 64)
    stored = weight.transpose(1, 2).contiguous()

    def write(param, given):
        for expert in range(3):
            param.data[expert].copy_(split.narrow(given[expert], 0).t())

    split.load(stored, write)
    assert split.stream.settle() == []
    assert split.equals(weight)


def test_checkpoint_tensor_that_is_part_of_another():
    """A model cuts two layers' weights out of one tensor."""
    split, stored = Split.of((12, 64), 0), weight_of(20, 200)
    weight = stored[5:17, 100:164]
    split.load(weight, lambda param, given: param.data.copy_(split.narrow(given)))
    assert split.stream.settle() == []
    assert split.equals(weight)


@pytest.mark.parametrize("rank", range(RANKS))
def test_rows_that_are_padded_for_the_ranks(rank):
    split, weight = Split.of((12, 64), 4, rank), weight_of(12, 50)
    padded = torch.nn.functional.pad(weight, (0, 14))
    split.load(weight, lambda param, given: param.data.copy_(split.narrow(torch.nn.functional.pad(given, (0, 14)))))
    assert split.stream.settle() == []
    assert split.equals(padded)
    assert not split.rows.is_narrowed


def test_values_beyond_those_that_are_given_are_cleared_first():
    split, weight = Split.of((12, 64), 4, rank=3), weight_of(12, 50)

    def write(param, given):
        param.data[:, 2:].zero_()
        param.data[:, :2].copy_(given[:, 48:])

    split.load(weight, write)
    assert split.stream.settle() == []
    assert split.equals(torch.nn.functional.pad(weight, (0, 14)))


@pytest.mark.parametrize("rows_a_unit", [0, 12])
@pytest.mark.parametrize("seed", range(20))
def test_any_order_split_and_repetition(rows_a_unit, seed):
    """Rows come in pieces, of which one comes twice with other values: the last counts, for scales as well."""
    choose = random.Random(seed)
    split, weight = Split.of((12, 64), rows_a_unit), weight_of(12, 64)
    cuts = [0, *sorted(choose.sample(range(1, 12), 3)), 12]
    boxes = [(slice(*rows), columns) for rows in pairwise(cuts) for columns in (slice(0, 7), slice(7, 16))]
    choose.shuffle(boxes)
    for factor, (rows, columns) in ((50, boxes[0]), *((1, box) for box in boxes)):

        def write(param, given, rows=rows, columns=columns):
            param.data[rows, columns].copy_(split.narrow(given)[:, columns])

        split.load(weight[rows] * factor, write)
    assert split.stream.settle() == []
    assert split.equals(weight)


def test_whole_rows_of_float32_are_compared_as_the_model_holds_them():
    split, weight = Split.of((12, 64), 4), weight_of(12, 64).float() * (1 + 2**-10)
    split.load(weight, lambda param, given: param.data.copy_(split.narrow(given)))
    assert split.stream.settle() == []
    assert split.equals(weight.to(torch.bfloat16))


@pytest.mark.parametrize("given", ["some columns", "two tensors", "nothing"])
def test_rows_that_are_not_seen_whole_are_noted(given):
    split, weight = Split.of((12, 64), 4), weight_of(12, 64)
    mine = split.narrow(weight).clone()
    match given:
        case "some columns":
            split.load(mine, lambda param, given: param.data.copy_(given))
        case "two tensors":
            with capture_of([split.placeholder], {storage_key(split.placeholder): split.stream})():
                split.loaded.wrap(lambda param, one, other: param.data.copy_(one))(split.placeholder, mine, weight)
        case "nothing":
            with capture_of([split.placeholder], {storage_key(split.placeholder): split.stream})():
                split.placeholder.data.copy_(mine)
    assert split.stream.settle() == []
    assert split.rows.is_narrowed
    values, scales = quantize_rows(mine)
    assert same_bytes(split.stream.storage.weight.flatten(), values.flatten())
    assert same_bytes(split.stream.storage.scale.flatten(), scales.flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_magnitudes_of_rows(dtype):
    rows = weight_of(3, 5, 70).to(dtype)
    rows[0, 1, 3], rows[1, 1, 4], rows[2] = -torch.inf, torch.nan, -0.0
    wanted = rows.abs().amax(-1)
    for given in (rows, rows[..., ::2].repeat_interleave(2, -1)[..., :70], torch._neg_view(rows.neg())):
        found = row_magnitudes(given)
        assert torch.equal(found.nan_to_num(nan=-1), given.abs().amax(-1).nan_to_num(nan=-1))
    assert row_magnitudes(rows).isnan().sum() == 1
    assert torch.equal(row_magnitudes(rows)[0], wanted[0])
