# SPDX-License-Identifier: Apache-2.0
"""What a call of a weight loader tells of the tensor that it was given."""

from __future__ import annotations

import pytest
import torch

from core.streams import per_expert, per_tensor
from sglang_overlay.core.layer import LayerStream
from sglang_overlay.core.loader_calls import CUT, PADDED, REPEATED

SHAPE = (8, 16)
FULL = torch.arange(1.0, 129.0).view(SHAPE).bfloat16()


def misfits(streamed, loader, given, ranks=1):
    streams = {"weight": (streamed.placeholder, streamed.stream)}
    layer = LayerStream("layer", streams, print, print, ranks)
    streamed.sources.offer(given, "checkpoint.weight")
    layer.wrap(loader)(streamed.placeholder, given)
    return layer.misfits


def pad(param, given):
    """As ``pad_or_narrow_weight`` of upstream's linear layers."""
    rows, columns = (whole - size for whole, size in zip(param.shape, given.shape, strict=True))
    param.data.copy_(torch.nn.functional.pad(given, (0, columns, 0, rows)))


def fill_the_rest(param, given):
    """As upstream's expert layers."""
    param.data[0].narrow(1, given.shape[1], SHAPE[1] - given.shape[1]).zero_()
    param.data[0].narrow(1, 0, given.shape[1]).copy_(given)


@pytest.mark.parametrize(
    ("loader", "given", "ranks", "outcome"),
    [
        (lambda param, given: param.data.copy_(given), FULL, 1, None),
        (lambda param, given: param.data.copy_(given[:, 16:]), torch.cat([FULL, FULL], 1), 2, None),
        (lambda param, given: param.data.copy_(given.float().clone()), FULL, 1, None),
        (lambda param, given: (param.data.zero_(), param.data.copy_(given)), FULL, 1, None),
        (lambda param, given: None, FULL, 1, None),
        (pad, FULL[:5], 1, PADDED),
        (pad, FULL[:, :5], 1, PADDED),
        (pad, FULL[:0], 2, PADDED),
        (lambda param, given: param.data.zero_(), FULL[:1], 2, PADDED),
        (lambda param, given: param.data.copy_(torch.zeros(SHAPE)), FULL, 2, PADDED),
        (lambda param, given: param.data.copy_(given), FULL[:1], 1, REPEATED),
        (lambda param, given: param.data.copy_(given), FULL[:, :1], 1, REPEATED),
        (lambda param, given: param.data.copy_(given[:8]), torch.cat([FULL, FULL]), 1, CUT),
        (lambda param, given: param.data.copy_(given[:8]), torch.cat([FULL, FULL, FULL]), 2, CUT),
    ],
)
def test_what_does_not_fill_its_part_is_told(loader, given, ranks, outcome):
    found = misfits(per_tensor(SHAPE), loader, given.clone(), ranks)
    assert [misfit.outcome for misfit in found] == ([outcome] if outcome else [])
    assert all(
        (misfit.tensor, misfit.shape, misfit.wanted) == ("checkpoint.weight", given.shape, SHAPE) for misfit in found
    )


def test_what_is_left_of_an_expert_and_filled_is_told():
    (found,) = misfits(per_expert((2, *SHAPE)), fill_the_rest, FULL[:, :12].clone())
    assert (found.outcome, found.shape, found.wanted) == (PADDED, (8, 12), SHAPE)
    assert str(found) == "checkpoint.weight [8, 12], padded with zeros to [8, 16] of layer.weight"
