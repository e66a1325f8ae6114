# SPDX-License-Identifier: Apache-2.0
"""Loads that take and stage every write and quantize nothing: what streaming costs besides quantizing.

For ``ci/bench --overhead`` on the CPU only: the loaded weights are whatever lay in their memory.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

from sglang_overlay.core.cpu_quantizers import PerTensorQuantizer
from sglang_overlay.plan.replacing import replaced

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sglang_overlay.core.staging import Piece


@contextlib.contextmanager
def nothing_quantized() -> Iterator[None]:
    """Has units of one scale count as quantized when they are complete."""
    with (
        replaced(PerTensorQuantizer, "quantize", _quantize),
        replaced(PerTensorQuantizer, "quantize_run", _quantize_run),
    ):
        yield


def _quantize(
    _quantizer: PerTensorQuantizer, _pieces: Sequence[Piece], _weight: torch.Tensor, _scale: torch.Tensor
) -> float:
    return 0.0


def _quantize_run(
    _quantizer: PerTensorQuantizer, values: torch.Tensor, _weight: torch.Tensor, _scale: torch.Tensor
) -> torch.Tensor:
    return torch.zeros(len(values))
