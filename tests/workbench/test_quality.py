# SPDX-License-Identifier: Apache-2.0
"""Losses as a server gives them, and weights as they are served, read back by their scales."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import pytest
import torch
from workbench.quality import activations
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


INTERPRETED = """
import sys, torch
import triton
from sglang.kernels.ops.quantization.fp8_kernel import _per_token_group_quant_8bit as kernel
given, columns = torch.load(sys.argv[1])
values, scale = torch.empty_like(given, dtype=torch.float32), torch.empty(given.numel() // columns)
block = triton.next_power_of_2(columns)
kernel[(scale.numel(),)](given, values, scale, columns, columns, 1e-10, -448.0, 448.0, BLOCK=block)
torch.save(values.to(torch.float8_e4m3fn).float().view(-1, columns) * scale[:, None], sys.argv[1])
"""


@pytest.mark.parametrize("columns", [128, 320, 640])
def test_activations_are_rounded_as_by_sglangs_kernel(columns, tmp_path):
    """By 128 columns, by token, and all tokens together, in Triton's interpreter, whose cast to e4m3 is wrong."""
    chance = torch.Generator().manual_seed(columns)
    given = (torch.randn(6, 640, generator=chance) * torch.logspace(-30, 3, 6)[:, None]).bfloat16()
    given[0, :columns] = 0
    torch.save((given, columns), tmp_path / "given")
    command = [sys.executable, "-c", INTERPRETED, tmp_path / "given"]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
    expected = torch.load(tmp_path / "given").view(given.shape)
    assert torch.equal(activations.in_groups(columns, given), expected.bfloat16())
    assert not torch.equal(given, expected.bfloat16())


@pytest.mark.server
def test_server_with_rounded_activations_has_other_losses(checkpoint, tmp_path):
    windows = (tuple(range(3, 51)),)
    losses = [
        served_losses(checkpoint("qwen3_moe"), STOCK, windows, tmp_path / "log", with_activations=rounded)
        for rounded in (False, True)
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.server
@pytest.mark.parametrize(("contender", "rounding"), [(BF16, 0.02), (STOCK, 0.05)], ids=["bf16", "fp8"])
def test_served_losses_are_those_of_the_model(contender, rounding, checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    path, chance = checkpoint("qwen3"), random.Random(0)
    windows = tuple(tuple(chance.choices(range(3, 512), k=48)) for _ in range(3))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = [model(input_ids=torch.tensor([w]), labels=torch.tensor([w])).loss.item() for w in windows]
    assert served_losses(path, contender, windows, tmp_path / "log") == pytest.approx(expected, abs=rounding)
