# SPDX-License-Identifier: Apache-2.0
"""Losses as a server gives them, and weights as they are served, read back by their scales."""

from __future__ import annotations

import random

import pytest
import torch
from workbench.quality.quality import BF16, STOCK, dequantized, ratio, served_losses

from sglang_overlay.core.regions import whole
from sglang_overlay.core.staging import Piece
from sglang_overlay.cpu_reference.mxfp8 import mxfp8_group_quantize
from sglang_overlay.schemes.arithmetic import quantize_rows
from sglang_overlay.schemes.block import BlockQuantizer

FP8 = torch.float8_e4m3fn


def by_rows(matrix):
    values, scale = quantize_rows(matrix, FP8)
    return {"w": values.t(), "w_scale": scale.t()}


def by_blocks(matrix):
    values, scale = torch.empty(matrix.shape, dtype=FP8), torch.empty(2, 3)
    BlockQuantizer().quantize([Piece(whole(matrix.shape), matrix)], values, scale.view(-1))
    return {"w": values, "w_scale_inv": scale}


def by_groups(matrix):
    values, exponents = mxfp8_group_quantize(matrix)
    return {"w": values, "w_scale_inv": exponents}


def of_two_experts(matrix):
    values, exponents = mxfp8_group_quantize(matrix)
    return {"w": values.view(2, 100, 320), "w_scale_inv": exponents.view(2, 100, 10)}


@pytest.mark.parametrize("stored", [by_rows, by_blocks, by_groups, of_two_experts])
def test_dequantized_weight_is_near_the_original(stored):
    matrix = torch.randn(200, 320, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = dequantized("w", stored(matrix))
    assert ratio(matrix.double(), found.reshape(matrix.shape)) > 30


@pytest.mark.server
@pytest.mark.parametrize(("contender", "rounding"), [(BF16, 0.02), (STOCK, 0.05)], ids=["bf16", "fp8"])
def test_served_losses_are_those_of_the_model(contender, rounding, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    path, chance = checkpoint("qwen3"), random.Random(0)
    windows = tuple(tuple(chance.choices(range(3, 512), k=48)) for _ in range(3))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = [model(input_ids=torch.tensor([w]), labels=torch.tensor([w])).loss.item() for w in windows]
    assert served_losses(path, contender, windows, tmp_path / "log") == pytest.approx(expected, abs=rounding)
