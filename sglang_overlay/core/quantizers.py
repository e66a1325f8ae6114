# SPDX-License-Identifier: Apache-2.0
"""Turn complete units into fp8 values and scales.

All quantizers write into slices of the final parameter. Pieces of a unit are disjoint and cover it; they have the
parameter's high-precision dtype and lie on the parameter's device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from sglang_overlay.core.regions import slices, whole
from sglang_overlay.core.staging import Piece

CHUNK_ELEMENTS = 1 << 15
"""Elements cast at once: 128 KiB of float32, which stays in cache, and no more than torch's own grain size, so that
no chunk wakes a thread team. On a busy machine waiting for that team costs far more than the cast."""


class UnitQuantizer(Protocol):
    """Quantizes units of one parameter. Must be safe to call from several threads for different units."""

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Quantize one unit.

        Args:
            pieces: the unit's values, shape of each its box.
            weight: fp8 output, shape of the unit.
            scale: float32 output, the unit's slice of the scale.
        """

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Quantize several whole units at once; the first dimension of each argument counts them."""


def assemble(pieces: Sequence[Piece], like: torch.Tensor) -> torch.Tensor:
    """One contiguous high-precision unit of the shape of ``like``; a single piece that is one already is not copied."""
    if len(pieces) == 1 and pieces[0].values.shape == like.shape:
        return pieces[0].values.contiguous()
    unit = torch.empty(like.shape, dtype=pieces[0].values.dtype, device=like.device)
    for piece in pieces:
        unit[slices(piece.box)].copy_(piece.values)
    return unit


class WholeUnitQuantizer:
    """Runs a function on each whole unit, for kernels that only take one contiguous matrix.

    Args:
        function: ``unit -> (fp8 values, float32 scale)``, upstream's own.
    """

    def __init__(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._function = function

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> None:
        values, factor = self._function(assemble(pieces, weight))
        weight.copy_(values)
        scale.copy_(factor.reshape(scale.shape))

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
        for unit, out, factor in zip(values, weight, scale, strict=True):
            quantized, unit_scale = self._function(unit.contiguous())
            out.copy_(quantized)
            factor.copy_(unit_scale.reshape(factor.shape))


class RowQuantizer:
    """Per-channel: every row of a run has its own scale, so a run of rows is one call.

    Args:
        function: ``[rows, columns] -> (fp8 [rows, columns], float32 scale of one element a row)``, upstream's own.
    """

    def __init__(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._function = function

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> None:
        self.quantize_run(assemble(pieces, weight).unsqueeze(0), weight.unsqueeze(0), scale.reshape(1))

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
        quantized, factors = self._function(values.contiguous())
        weight.copy_(quantized)
        scale.copy_(factors.reshape(scale.shape))


class PerTensorArithmetic(Protocol):
    """How one scale is made and applied. Everything is float32."""

    def absmax(self, values: torch.Tensor) -> torch.Tensor:
        """Largest magnitude, 0-d; the largest of several tensors' results is their common one."""

    def factors(self, absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What values are multiplied by, and the scale that is stored; both 0-d."""

    def saturate_(self, products: torch.Tensor, limit: float) -> torch.Tensor:
        """Bring products into the fp8 range, in place."""


class RatioArithmetic:
    """Multiply by ``fp8_max / absmax`` and store the reciprocal of that; a NaN makes every value NaN.

    The arithmetic of SGLang's ``input_to_float8`` (``fp8_utils.py``), in the same order and precision.
    """

    def __init__(self, fp8_max: float) -> None:
        self._fp8_max = fp8_max

    def absmax(self, values: torch.Tensor) -> torch.Tensor:
        low, high = values.aminmax()
        return torch.maximum(low.abs(), high.abs()).float()

    def factors(self, absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        multiplier = self._fp8_max / absmax.clamp(min=1e-12)
        return multiplier, multiplier.reciprocal()

    def saturate_(self, products: torch.Tensor, limit: float) -> torch.Tensor:
        return products.clamp_(min=-limit, max=limit)


class KernelArithmetic:
    """Multiply by ``1 / (absmax / fp8_max)`` and store ``absmax / fp8_max``; NaN counts for nothing and saturates.

    The arithmetic of SGLang's CUDA kernel ``per_tensor_quant_fp8`` (``fmaxf`` and ``fminf`` drop NaN), in the same
    order and precision. An all-zero unit gets scale 0 and the values 448, which dequantize to 0, as there.
    """

    def __init__(self, fp8_max: float) -> None:
        self._fp8_max = fp8_max

    def absmax(self, values: torch.Tensor) -> torch.Tensor:
        low, high = values.aminmax()
        found = torch.maximum(low.abs(), high.abs()).float()
        if found.isnan():
            return values.float().abs().nan_to_num_(nan=0.0, posinf=torch.inf).amax()
        return found

    def factors(self, absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = absmax / self._fp8_max
        return scale.reciprocal(), scale

    def saturate_(self, products: torch.Tensor, limit: float) -> torch.Tensor:
        return products.nan_to_num_(nan=limit, posinf=limit, neginf=-limit).clamp_(min=-limit, max=limit)


class PerTensorQuantizer:
    """Per-tensor, without ever joining the pieces: the largest of the pieces' maxima is the unit's.

    Needs no memory beyond one cache-sized chunk. Bit-identical to quantizing the whole unit, since a maximum does not
    depend on grouping and each element is cast alone.
    """

    def __init__(self, arithmetic: PerTensorArithmetic) -> None:
        self._arithmetic = arithmetic

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> None:
        absmax = torch.stack([self._arithmetic.absmax(piece.values) for piece in pieces]).amax()
        multiplier, stored = self._arithmetic.factors(absmax)
        for piece in pieces:
            self._cast(piece.values, multiplier, weight[slices(piece.box)])
        scale.copy_(stored.reshape(scale.shape))

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
        for unit, out, factor in zip(values, weight, scale, strict=True):
            self.quantize([Piece(whole(unit.shape), unit)], out, factor)

    def _cast(self, values: torch.Tensor, multiplier: torch.Tensor, out: torch.Tensor) -> None:
        limit = torch.finfo(out.dtype).max
        rows = max(1, CHUNK_ELEMENTS // max(1, values[0].numel()))
        # One dimension or more, not zero: a 0-d factor would not promote bf16 values to float32.
        factor = multiplier.reshape((1,) * values.dim())
        for chunk, target in zip(values.split(rows), out.split(rows), strict=True):
            target.copy_(self._arithmetic.saturate_(torch.mul(chunk, factor), limit))
