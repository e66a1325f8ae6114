# SPDX-License-Identifier: Apache-2.0
"""Loads that skip parts of quantizing, to measure what streaming costs besides quantizing, and a lower bound.

For ``ci/bench --overhead`` and ``--floor`` on the CPU only: the result is not a usable model.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from sglang_overlay.cpu_reference import kernels
from sglang_overlay.cpu_reference.per_tensor import PerTensorQuantizer, cast_by_loops
from sglang_overlay.offline.plan.replacing import replaced

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sglang_overlay.core.staging import Piece


@contextlib.contextmanager
def nothing_quantized() -> Iterator[None]:
    """Make complete units with one scale count as quantized without any work."""
    with (
        replaced(PerTensorQuantizer, "quantize", _quantize),
        replaced(PerTensorQuantizer, "quantize_run", _quantize_run),
    ):
        yield


@contextlib.contextmanager
def quantized_in_one_pass() -> Iterator[None]:
    """Make units with one scale be read and written only once, as fp8 with scale 1, without finding their maximum."""
    with replaced(PerTensorQuantizer, "quantize", _quantize_once):
        yield


def _quantize_once(
    _quantizer: PerTensorQuantizer, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor
) -> float:
    out = kernels.target(weight)
    for piece in pieces:
        if not cast_by_loops(kernels.source(piece.values), 1.0, out, piece.box):
            raise RuntimeError("the compiled loops do not take this weight, so one pass over it cannot be timed")
    scale.fill_(1.0)
    return 1.0


def _quantize(
    _quantizer: PerTensorQuantizer, _pieces: Sequence[Piece], _weight: torch.Tensor, _scale: torch.Tensor
) -> float:
    return 0.0


def _quantize_run(
    _quantizer: PerTensorQuantizer, values: torch.Tensor, _weight: torch.Tensor, _scale: torch.Tensor
) -> torch.Tensor:
    return torch.zeros(len(values))
