# SPDX-License-Identifier: Apache-2.0
"""fp8 quantization with one scale a unit on the CPU, without a copy of the unit in float32.

The arithmetic is upstream's, to the bit; ``kernels.py`` has compiled loops for most of it.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from sglang_overlay.core.quantizers import OneScaleAUnit
from sglang_overlay.core.regions import Box, whole
from sglang_overlay.core.staging import Piece
from sglang_overlay.cpu_reference import kernels
from sglang_overlay.schemes.arithmetic import CHUNK_ELEMENTS


class PerTensorArithmetic(Protocol):
    """How one scale is made and applied, in float32.

    Attributes:
        smallest: from this absmax up, and if that is finite, each product rounds into the fp8 range by itself.
    """

    smallest: float

    def absmax(self, values: torch.Tensor) -> float:
        """Largest magnitude where NaN may be among the values."""

    def factors(self, absmax: float) -> tuple[float, float]:
        """What values are multiplied by, and the scale that is stored; both exact in float32."""

    def saturate_(self, products: torch.Tensor, limit: float) -> torch.Tensor:
        """Bring products into the fp8 range, in place."""


class RatioArithmetic:
    """Multiply by ``fp8_max / absmax`` and store the reciprocal of that; a NaN makes every value NaN.

    The arithmetic of SGLang's ``input_to_float8`` (``fp8_utils.py``), in the same order and precision.
    """

    smallest = 0.0

    def __init__(self, fp8_max: float) -> None:
        self._fp8_max = fp8_max
        self._least = _float32(1e-12)

    def absmax(self, values: torch.Tensor) -> float:
        return _largest(values)

    def factors(self, absmax: float) -> tuple[float, float]:
        # Not max(), which drops a NaN. A number over a tensor is, in torch, the number times the reciprocal.
        clamped = self._least if absmax < self._least else absmax
        multiplier = _float32(_float32(1.0 / clamped) * self._fp8_max)
        return multiplier, _float32(_inverse(multiplier))

    def saturate_(self, products: torch.Tensor, limit: float) -> torch.Tensor:
        return products.clamp_(min=-limit, max=limit)


class KernelArithmetic:
    """Multiply by ``1 / (absmax / fp8_max)`` and store ``absmax / fp8_max``; NaN counts for nothing and saturates.

    The arithmetic of SGLang's CUDA kernel ``per_tensor_quant_fp8`` (``fmaxf`` and ``fminf`` drop NaN), in the same
    order and precision. An all-zero unit gets scale 0 and the values 448, which dequantize to 0, as there.
    """

    def __init__(self, fp8_max: float) -> None:
        self._fp8_max = fp8_max
        # The scale must be a normal number: the reciprocal of a subnormal one is far off, or infinite.
        self.smallest = 2 * fp8_max * torch.finfo(torch.float32).smallest_normal

    def absmax(self, values: torch.Tensor) -> float:
        return float(values.float().abs().nan_to_num_(nan=0.0, posinf=torch.inf).amax())

    def factors(self, absmax: float) -> tuple[float, float]:
        scale = _float32(absmax / self._fp8_max)
        return _float32(_inverse(scale)), scale

    def saturate_(self, products: torch.Tensor, limit: float) -> torch.Tensor:
        return products.nan_to_num_(nan=limit, posinf=limit, neginf=-limit).clamp_(min=-limit, max=limit)


class PerTensorQuantizer(OneScaleAUnit):
    """Per-tensor, without ever joining the pieces: the largest of the pieces' maxima is the unit's.

    Needs no memory beyond one cache-sized chunk. Bit-identical to quantizing the whole unit, since a maximum does not
    depend on grouping and each element is cast alone. For the CPU: elsewhere, reading the maximum would wait for the
    device.
    """

    def __init__(self, arithmetic: PerTensorArithmetic) -> None:
        self._arithmetic = arithmetic

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> float:
        matrices = [kernels.source(piece.values) for piece in pieces]
        absmax = found = _most([_largest(piece.values, matrix) for piece, matrix in zip(pieces, matrices, strict=True)])
        in_range = self._arithmetic.smallest <= absmax < math.inf
        if not in_range:
            absmax = _most([self._arithmetic.absmax(piece.values) for piece in pieces])
        multiplier, stored = self._arithmetic.factors(absmax)
        out = kernels.target(weight) if in_range else None
        for piece, matrix in zip(pieces, matrices, strict=True):
            if not cast_by_loops(matrix, multiplier, out, piece.box):
                self._cast(piece.values, multiplier, _cut(weight, piece.box), in_range)
        scale.fill_(stored)
        return found

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        units = zip(values, weight, scale, strict=True)
        return torch.tensor(
            [self.quantize([Piece(whole(unit.shape), unit)], out, factor) for unit, out, factor in units],
            dtype=torch.float32,
        )

    def _cast(self, values: torch.Tensor, multiplier: float, target: torch.Tensor, in_range: bool) -> None:  # noqa: FBT001
        for chunk, out in _chunks(values, target):
            products = _scratch(chunk.shape).copy_(chunk).mul_(multiplier)
            if not in_range:
                products = self._arithmetic.saturate_(products, torch.finfo(out.dtype).max)
            out.copy_(products)


def cast_by_loops(values: kernels.Matrix | None, multiplier: float, out: kernels.Matrix | None, box: Box) -> bool:
    """Whether the compiled loops could write ``values`` to a box of ``out``, and have."""
    if values is None or out is None:
        return False
    target = kernels.part_of(out, box)
    if target is None or (values.rows, values.columns) != (target.rows, target.columns):
        return False
    kernels.quantize(values, multiplier, target)
    return True


def _float32(value: float) -> float:
    """Rounded as float32 arithmetic rounds: Python computes products and quotients of two float32 precisely enough."""
    return ctypes.c_float(value).value


def _inverse(value: float) -> float:
    return 1.0 / value if value else math.inf


def _largest(values: torch.Tensor, matrix: kernels.Matrix | None = None) -> float:
    """Largest magnitude; NaN where any value is. ``matrix`` is what the compiled loops see of ``values``."""
    if matrix is not None:
        return kernels.largest(matrix)
    low, high = values.aminmax()
    return max(abs(float(low)), abs(float(high)))


def _most(found: Sequence[float]) -> float:
    """The largest; NaN where any is, which ``max`` alone would not see."""
    most = max(found)
    return math.nan if any(value != value for value in found) else most


def _chunks(values: torch.Tensor, out: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if values.numel() <= CHUNK_ELEMENTS:
        yield values, out
        return
    rows = max(1, CHUNK_ELEMENTS // values[0].numel())
    yield from zip(values.split(rows), out.split(rows), strict=True)


_buffers = threading.local()


def _scratch(shape: torch.Size) -> torch.Tensor:
    """Float32 memory of this thread's own, used again for each chunk: fresh memory would cost a page fault a page."""
    needed = math.prod(shape)
    buffer: torch.Tensor | None = getattr(_buffers, "chunk", None)
    if buffer is None or buffer.numel() < needed:
        buffer = _buffers.chunk = torch.empty(max(needed, CHUNK_ELEMENTS), dtype=torch.float32)
    return buffer[:needed].view(shape)


def _cut(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The box of ``tensor``: like indexing with ``slices``, but much faster if few axes are cut."""
    for axis, (start, stop) in enumerate(box):
        if stop - start != tensor.shape[axis]:
            tensor = tensor.narrow(axis, start, stop - start)
    return tensor
