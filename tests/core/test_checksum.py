"""The checksum is as described, differs when anything differs, and does not depend on how it is computed."""

from __future__ import annotations

import random

import pytest
import torch

from sglang_overlay.core import checksum
from sglang_overlay.core.checksum import COLUMNS, checksums

MASK = (1 << 64) - 1
SIZES = (0, 1, 7, 8, 9, 1000, 8 * COLUMNS, 16 * COLUMNS, 24 * COLUMNS + 8 * 5 + 3)
"""Bytes: without whole words, without whole rows, one row, two rows, and all of these together."""


def reference(*tensors):
    """The same in Python's integers, from the description."""
    sums = []
    for tensor in tensors:
        raw = bytes(tensor.flatten().view(torch.uint8).tolist())
        words = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw) - 7, 8)]
        rows = [words[at : at + COLUMNS] for at in range(0, len(words) - COLUMNS + 1, COLUMNS)]
        if len(rows) > 1:
            sums += [sum(row) for row in rows] + [sum(column) for column in zip(*rows, strict=True)]
            words = words[len(rows) * COLUMNS :]
        sums += words + list(raw[len(raw) // 8 * 8 :])
    return sum(splitmix(value + place * 0x9E3779B97F4A7C15) for place, value in enumerate(sums, 1)) & MASK


def splitmix(word):
    word &= MASK
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK
    return word ^ (word >> 31)


def made(size, seed=0):
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def of(*tensors):
    (found,) = checksums([tensors])
    return found


@pytest.mark.parametrize("size", SIZES)
def test_is_what_its_description_says(size):
    tensor = made(size)
    assert of(tensor) == reference(tensor)
    assert of(tensor, made(9), tensor) == reference(tensor, made(9), tensor)


def test_known_values_stay_as_they_are():
    """Replicas may run different versions of this package."""
    assert checksums([[], [torch.arange(3.0)], [torch.arange(5000, dtype=torch.int64)]]) == [
        0,
        reference(torch.arange(3.0)),
        reference(torch.arange(5000, dtype=torch.int64)),
    ]


@pytest.mark.parametrize("size", SIZES[1:])
def test_any_byte_that_changes_changes_it(size):
    tensor, random_ = made(size), random.Random(size)
    before = of(tensor)
    for place in {0, size - 1, *(random_.randrange(size) for _ in range(200))}:
        changed = tensor.clone()
        changed[place] ^= random_.randrange(1, 256)
        assert of(changed) != before, place


@pytest.mark.parametrize(("one", "other"), [(0, 1), (0, COLUMNS), (COLUMNS, COLUMNS + 1), (5, 2 * COLUMNS + 6)])
def test_two_words_that_change_places_change_it(one, other):
    """In a row, in a column, and in neither."""
    words = made(SIZES[-1])[:-3].view(torch.int64)
    changed = words.clone()
    changed[[one, other]] = words[[other, one]]
    assert of(changed) != of(words)


def test_top_bytes_that_change_places_change_it():
    """In a sum of products modulo 2^64 they would count as eight bits."""
    values = made(24 * COLUMNS)
    before = of(values)
    for place in range(15, 24 * COLUMNS, 8 * 37):
        changed = values.clone()
        changed[[7, place]] = values[[place, 7]]
        assert of(changed) != before or values[7] == values[place]


def test_rows_that_change_places_change_it():
    matrix = made(24 * COLUMNS).view(3, -1)
    assert of(matrix[[1, 0, 2]].contiguous()) != of(matrix)


def test_order_of_tensors_and_where_one_ends_count():
    one, other = made(9), made(9, seed=1)
    assert of(one, other) != of(other, one)
    assert of(torch.cat([one, other])) != of(one, other)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_pieces_that_are_summed_at_once_have_no_influence(rows, monkeypatch):
    tensor = made(8 * COLUMNS * 7 + 5)
    monkeypatch.setattr(checksum, "PIECE_ROWS", rows)
    assert of(tensor) == reference(tensor)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int8, torch.bool])
def test_bytes_count_and_not_what_they_mean(dtype):
    raw = made(640) % 2 if dtype is torch.bool else made(640)
    assert of(raw.view(dtype)) == of(raw)


def test_nan_and_negative_zero_are_told_apart_by_their_bytes():
    assert of(torch.tensor([0.0])) != of(torch.tensor([-0.0]))
    assert of(torch.tensor([float("nan")])) == of(torch.tensor([float("nan")]))


class TestLayouts:
    matrix = made(64 * 48).view(64, 48).view(torch.float8_e4m3fn)

    def test_transposed_view_is_read_as_it_lies(self):
        assert of(self.matrix.t()) == of(self.matrix)
        assert of(self.matrix.view(4, 16, 48).permute(2, 0, 1)) == of(self.matrix)

    def test_strides_of_dimensions_of_one_have_no_influence(self):
        column = made(64)
        assert of(column.as_strided((64, 1), (1, 64))) == of(column.as_strided((64, 1), (1, 1))) == of(column)

    def test_view_with_gaps_is_read_without_them(self):
        for view in (self.matrix[:, :8], self.matrix[::2], self.matrix[:1].expand(3, -1), self.matrix.t()[3:7]):
            assert of(view) == of(view.contiguous())

    @pytest.mark.parametrize("start", range(9))
    def test_any_address_will_do(self, start):
        part = made(24 * COLUMNS)[start:]
        assert of(part) == of(part.clone())


def test_tensors_are_left_alone_and_may_be_made_in_inference_mode():
    with torch.inference_mode():
        inner = made(8 * COLUMNS * 3)
    parameter = torch.nn.Parameter(made(8 * COLUMNS * 3 * 4).view(torch.bfloat16).nan_to_num())
    before = inner.clone(), parameter.detach().clone()
    assert of(inner) == of(before[0])
    assert of(parameter) == of(before[1])
    assert torch.equal(inner, before[0])
    assert torch.equal(parameter, before[1])


def test_number_of_threads_has_no_influence():
    tensor, threads = made(8 * COLUMNS * 600 + 11), torch.get_num_threads()
    found = set()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.add(of(tensor))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
