# SPDX-License-Identifier: Apache-2.0
"""Serve a model on the CPU reference with quantized activations: ``python -m workbench.quality.activations ARGUMENTS``.

On a GPU, SGLang quantizes what it multiplies fp8 weights with; the CPU reference does not. Here its products get their
inputs rounded as SGLang 0.5.23 does on NVIDIA GPUs, then multiply them in the model's dtype:

- linear layers: each token by its largest magnitude (``apply_fp8_linear``, ``sglang_per_token_quant_fp8``);
- experts with one scale each: all tokens by their largest magnitude; with channels' scales: each token
  (``fused_moe_triton_kernels.py``, ``scaled_fp8_quant``);
- block-wise: 128 columns of a token (``per_token_group_quant_8bit``); MXFP8: 32 columns, by a power of two.

``VARIABLE`` says which: the name in ``ROUNDINGS`` for linear layers, a comma, and that for experts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from sglang_overlay.cpu_reference import linear, moe, mxfp8

if TYPE_CHECKING:
    from types import ModuleType

VARIABLE = "STREAMFP8_QUALITY_ACTIVATIONS"
_FP8_MAX = 448.0
_SMALLEST = 1e-10
"""The ``eps`` of SGLang's kernels."""

Rounding = Callable[[torch.Tensor], torch.Tensor]
"""From ``[tokens, columns]`` in the model's dtype to the values that its fp8 numbers and scales stand for."""


def in_groups(columns: int, values: torch.Tensor) -> torch.Tensor:
    """By the largest magnitude of each group of this many columns, as ``_per_token_group_quant_8bit`` does."""
    groups = values.float().view(-1, columns)
    scale = groups.abs().amax(dim=1, keepdim=True).clamp(min=_SMALLEST) / _FP8_MAX
    rounded = (groups * scale.reciprocal()).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn)
    return (rounded.float() * scale).view(values.shape).to(values.dtype)


def by_token(values: torch.Tensor) -> torch.Tensor:
    """By the largest magnitude of each row."""
    return in_groups(values.shape[-1], values)


def by_tensor(values: torch.Tensor) -> torch.Tensor:
    """By the largest magnitude of all."""
    return in_groups(values.numel(), values)


def in_mxfp8(values: torch.Tensor) -> torch.Tensor:
    """As MXFP8 weights are."""
    rounded, exponents = mxfp8.mxfp8_group_quantize(values.reshape(-1, values.shape[-1]))
    return mxfp8.dequantize_groups(rounded, exponents, values.dtype).view(values.shape)


def unchanged(values: torch.Tensor) -> torch.Tensor:
    """In the model's dtype, as for int8 experts."""
    return values


ROUNDINGS: Mapping[str, Rounding] = {
    "token": by_token,
    "tensor": by_tensor,
    "block": partial(in_groups, 128),
    "mxfp8": in_mxfp8,
    "none": unchanged,
}


def quantize_activations(chosen: str) -> None:
    """Have the CPU reference's products round their inputs, in this process; ``chosen`` is as for ``VARIABLE``."""
    of_linear, of_experts = (ROUNDINGS[name] for name in chosen.split(","))
    for module, rounding in ((linear, of_linear), (mxfp8, of_linear), (moe, of_experts)):
        _round_inputs(module, rounding)


def _round_inputs(module: ModuleType, rounding: Rounding) -> None:
    def product(values: torch.Tensor, *others: Any) -> torch.Tensor:
        return torch.nn.functional.linear(rounding(values) if values.numel() else values, *others)

    module.__dict__["linear"] = product


if VARIABLE in os.environ:
    # In each process that SGLang spawns, too: they import the program anew.
    quantize_activations(os.environ[VARIABLE])

if __name__ == "__main__":
    from sglang.launch_server import prepare_server_args, run_server

    run_server(prepare_server_args(sys.argv[1:]))
