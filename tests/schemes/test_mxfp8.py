# SPDX-License-Identifier: Apache-2.0
"""MXFP8 row by row against the whole matrix at once, and what cannot be streamed."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from core.streams import same_bytes, streamed
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_overlay.core.regions import whole
from sglang_overlay.core.staging import Piece
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.cpu_reference.mxfp8 import mxfp8_group_quantize
from sglang_overlay.errors import UnexpectedParametersError
from sglang_overlay.schemes import mxfp8
from sglang_overlay.schemes.mxfp8 import GROUP, GroupQuantizer

FP8 = torch.float8_e4m3fn
QUANTIZER = GroupQuantizer(mxfp8_group_quantize)


def random_values(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-6, 3, rows).unsqueeze(1)
    return (torch.randn(rows, columns, generator=generator) * sizes).bfloat16()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_writes_of_any_order_and_split_equal_the_whole(data):
    units, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4)) * GROUP
    rows = data.draw(st.sampled_from([1, 4]))  # Of a unit, as of linear layers and of experts.
    values = random_values(units * rows, columns, data.draw(st.integers(0, 99)))
    down = sorted({0, rows, *data.draw(st.lists(st.integers(0, rows), max_size=2))})
    across = sorted({0, columns, *data.draw(st.lists(st.integers(1, columns - 1), max_size=2))})
    boxes = data.draw(st.permutations([(*row, *column) for row in pairwise(down) for column in pairwise(across)]))
    shape = (units, columns) if rows == 1 else (units, rows, columns)
    found = streamed(shape, UnitGrid.per_slice(shape), QUANTIZER, (units, rows * columns // GROUP))
    matrices = values.view(units, rows, columns)
    with found.capture():
        placeholders = found.placeholder.data.view(units, rows, columns)
        for top, bottom, left, right in boxes:
            placeholders[:, top:bottom, left:right].copy_(matrices[:, top:bottom, left:right])
    assert found.stream.settle() == []
    weight, exponents = mxfp8_group_quantize(values)
    assert same_bytes(found.stream.storage.weight.view(values.shape), weight)
    assert same_bytes(found.stream.storage.scale.view(len(values), -1).to(torch.uint8), exponents)


@pytest.mark.parametrize("shape", [(3 * GROUP,), (4, 3 * GROUP)])
def test_own_values_could_be_and_others_could_not(shape):
    values = random_values(1, 3 * GROUP)[0] if len(shape) == 1 else random_values(*shape)
    weight, scale = torch.empty(shape, dtype=FP8), torch.empty(values.numel() // GROUP, dtype=torch.uint8)
    QUANTIZER.quantize([Piece(whole(shape), values)], weight, scale)
    box = (*((1, 3) for _ in shape[:-1]), (20, 90))
    cut = tuple(slice(*interval) for interval in box)
    assert QUANTIZER.could_be(Piece(box, values[cut]), weight, scale)
    other = values[cut].clone()
    other[..., 50] = other[..., 50] * 2 + 1
    assert not QUANTIZER.could_be(Piece(box, other), weight, scale)


def test_nan_is_told():
    values = random_values(4, 2 * GROUP)
    values[2, 40] = torch.nan
    weight, scale = torch.empty(values.shape, dtype=FP8), torch.empty(4, 2, dtype=torch.uint8)
    magnitudes = QUANTIZER.quantize_run(values, weight, scale)
    assert magnitudes.isnan().tolist() == [False, False, True, False]


class Layer(torch.nn.Module):
    """A linear layer before its weights are made."""

    def __init__(self, **method):
        super().__init__()
        self.quant_method = SimpleNamespace(**method)

    def create(self, columns):
        self.weight = torch.nn.Parameter(torch.empty(8, columns, dtype=torch.bfloat16), requires_grad=False)


def test_parameter_keeps_its_class_and_attributes_as_stock_does():
    layer, plan = Layer(), mxfp8.Mxfp8LinearPlan()

    def create():
        layer.create(64)
        layer.weight.weight_loader = print

    made = plan.create(create, layer, torch.bfloat16)
    layer.weight.weight_loader = repr
    storage = plan.allocate("weight", made.parameters["weight"], torch.device("cpu"))
    plan.register(layer, {"weight": storage})
    assert (layer.weight.dtype, layer.weight.weight_loader) == (FP8, print)
    assert (layer.weight_scale_inv.dtype, tuple(layer.weight_scale_inv.shape)) == (torch.uint8, (8, 2))


def test_rows_that_do_not_divide_into_groups_are_stocks():
    layer = Layer()
    with pytest.raises(UnexpectedParametersError, match=r"weight has rows of 48.*multiple of 32"):
        mxfp8.Mxfp8LinearPlan().create(lambda: layer.create(48), layer, torch.bfloat16)


def test_what_sglang_converts_to_blocks_is_stocks():
    layer = Layer(convert_mxfp8_to_block=True)
    with pytest.raises(UnexpectedParametersError, match="SGLANG_FORCE_MXFP8_BLOCK_CONVERT"):
        mxfp8.Mxfp8LinearPlan().create(lambda: layer.create(64), layer, torch.bfloat16)


def test_method_is_what_it_was_after_it_has_taken_its_layer_for_one_of_a_checkpoint():
    shared = SimpleNamespace(is_checkpoint_fp8_serialized=False)
    linear = SimpleNamespace(quant_config=shared, is_checkpoint_fp8_serialized=False)
    experts = SimpleNamespace(quant_config=shared)
    seen = []

    def original():
        seen.append((linear.is_checkpoint_fp8_serialized, experts.quant_config.is_checkpoint_fp8_serialized))
        seen.append(shared.is_checkpoint_fp8_serialized)

    with mxfp8._as_of_a_checkpoint(linear), mxfp8._as_of_a_checkpoint(experts):
        original()
    assert seen == [(True, True), False]
    assert vars(linear) == {"quant_config": shared, "is_checkpoint_fp8_serialized": False}
    assert vars(experts) == {"quant_config": shared}
