# SPDX-License-Identifier: Apache-2.0
"""Per-tensor fp8 quantization of bfloat16 on the CPU: one pass for the maximum, one for the cast, no Python lock.

torch converts to float8_e4m3fn one element at a time, and that would be half of a load. These loops give the same bits:
``c10/util/Float8_e4m3fn.h`` of PyTorch says how it rounds (to nearest, ties to even; subnormals by adding a power of
two whose last place is theirs). Where they cannot be compiled, torch does the work.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from sglang_overlay.core.cpu_loops import COMPARED, CONVERTED, Loops, compile_loops

logger = logging.getLogger(__name__)

_INFINITY = 0x7F80
"""Of bfloat16; NaN are above it."""


class _Matrix(NamedTuple):
    """A tensor as a matrix: number and length of its contiguous rows, and elements from one to the next."""

    rows: int
    columns: int
    stride: int


def prepare() -> None:
    """Compile the loops now, which takes some 50 ms once a process, and not in the middle of a load."""
    _loops()


def can_read(values: torch.Tensor) -> bool:
    """Whether ``largest`` can take ``values``."""
    return (
        values.dtype == torch.bfloat16
        and values.device.type == "cpu"
        and _matrix(values) is not None
        and _loops() is not None
    )


def can_write(values: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether ``quantize`` can take these two."""
    return (
        can_read(values)
        and out.dtype == torch.float8_e4m3fn
        and out.device.type == "cpu"
        and _has_shape(_matrix(values), _matrix(out))
    )


def largest(values: torch.Tensor) -> float:
    """Largest magnitude; NaN where any value is.

    Args:
        values: not empty, and such that ``can_read`` it.
    """
    rows, columns, stride = _matrix(values) or _NOTHING
    bits = 0
    for lanes, start, count in _steps(columns, COMPARED):
        address = values.data_ptr() + start * values.itemsize
        bits = max(bits, _compiled().largest[lanes](address, stride, rows, count))
    if bits > _INFINITY:
        return math.nan
    (magnitude,) = struct.unpack("<f", struct.pack("<I", bits << 16))
    return float(magnitude)


def quantize(values: torch.Tensor, multiplier: float, out: torch.Tensor) -> None:
    """Write ``values * multiplier`` as fp8, the product rounded to float32 first.

    No product may exceed 448 by more than rounding: nothing saturates here.

    Args:
        values: high precision.
        multiplier: exact in float32.
        out: fp8 of the same shape, and such that ``can_write`` it.
    """
    rows, columns, stride = _matrix(values) or _NOTHING
    _, _, out_stride = _matrix(out) or _NOTHING
    for lanes, start, count in _steps(columns, CONVERTED):
        source, target = (tensor.data_ptr() + start * tensor.itemsize for tensor in (values, out))
        _compiled().convert[lanes](source, stride, target, out_stride, rows, count, multiplier)


_NOTHING = _Matrix(0, 0, 0)


@cache
def _loops() -> Loops | None:
    try:
        return compile_loops()
    except Exception as error:  # No llvmlite, or one whose LLVM speaks another dialect.
        logger.info("StreamFP8: fp8 conversion on the CPU is left to torch (%s: %s).", type(error).__name__, error)
        return None


def _compiled() -> Loops:
    loops = _loops()
    if loops is None:
        raise RuntimeError("there are no compiled loops: ask can_read or can_write first")
    return loops


def _matrix(tensor: torch.Tensor) -> _Matrix | None:
    if not tensor.numel():
        return None
    if tensor.dim() == 2 and tensor.stride(1) == 1:
        return _Matrix(tensor.shape[0], tensor.shape[1], tensor.stride(0))
    return _Matrix(1, tensor.numel(), tensor.numel()) if tensor.is_contiguous() else None


def _has_shape(one: _Matrix | None, other: _Matrix | None) -> bool:
    return one is not None and other is not None and one[:2] == other[:2]


def _steps(columns: int, lanes: int) -> Iterator[tuple[int, int, int]]:
    """Lanes, start and number of columns: as many whole vectors as there are, and the rest one at a time."""
    vectors = columns // lanes * lanes
    for width, start, stop in ((lanes, 0, vectors), (1, vectors, columns)):
        if start < stop:
            yield width, start, stop - start
