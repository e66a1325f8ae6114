"""Quantize a unit with a function that takes all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sglang.srt.layers.quantization.streaming_fp8.quantizer import aligned, assemble
from sglang.srt.layers.quantization.streaming_fp8.regions import whole
from sglang.srt.layers.quantization.streaming_fp8.staging import Piece

QuantizeFunc = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""High-precision values -> (fp8 values, float32 scales)."""


class WholeUnitQuantizer:
    """Runs ``function`` on each unit, as if that were all there is."""

    def __init__(self, function: QuantizeFunc) -> None:
        self.function = function

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> None:
        values, scales = self.function(aligned(assemble(pieces, weight)))
        assert values.dtype == weight.dtype
        assert scales.numel() == scale.numel()
        weight.copy_(values)
        scale.copy_(scales.reshape(scale.shape))

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
        for unit, out, scales in zip(values, weight, scale):
            self.quantize([Piece(whole(unit.shape), unit)], out, scales)
