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
import threading
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

from sglang_overlay.core.regions import Box
from sglang_overlay.cpu_reference.loops import COMPARED, CONVERTED, Loops, compile_loops

logger = logging.getLogger(__name__)

_INFINITY = 0x7F80
"""Of bfloat16; NaN are above it."""

_BFLOAT_BYTES = 2


class Matrix(NamedTuple):
    """Where a tensor lies that the loops can take. Valid as long as the tensor lives.

    Attributes:
        address: of the first element.
        rows, columns: elements of a row are adjacent.
        stride: elements from one row to the next.
    """

    address: int
    rows: int
    columns: int
    stride: int


def prepare() -> None:
    """Compile the loops, once a process: 0.1 s, most of it for the import of llvmlite. Otherwise the first use does."""
    _loops()


def source(values: torch.Tensor) -> Matrix | None:
    """High-precision ``values``, where the loops can read them."""
    return _matrix(values) if values.dtype == torch.bfloat16 and _loops() is not None else None


def target(out: torch.Tensor) -> Matrix | None:
    """fp8 memory, where the loops can fill it."""
    return _matrix(out) if out.dtype == torch.float8_e4m3fn and _loops() is not None else None


def part_of(out: Matrix, box: Box) -> Matrix | None:
    """A box of a ``target``; None where that has not been made of a tensor of two dimensions, or not as one matrix."""
    if len(box) != 2:
        return None
    (top, bottom), (left, right) = box
    is_inside = bottom <= out.rows and right <= out.columns
    return Matrix(out.address + top * out.stride + left, bottom - top, right - left, out.stride) if is_inside else None


def largest(values: Matrix) -> float:
    """Largest magnitude; NaN where any value is."""
    loops, bits = _compiled(), 0
    for lanes, start, count in _steps(values.columns, COMPARED):
        found = loops.largest[lanes](values.address + _BFLOAT_BYTES * start, values.stride, values.rows, count)
        bits = max(bits, found)
    if bits > _INFINITY:
        return math.nan
    (magnitude,) = struct.unpack("<f", struct.pack("<I", bits << 16))
    return float(magnitude)


def quantize(values: Matrix, multiplier: float, out: Matrix) -> None:
    """Write ``values * multiplier`` as fp8, the product rounded to float32 first.

    No product may exceed 448 by more than rounding: nothing saturates here.

    Args:
        values: a ``source``.
        multiplier: exact in float32.
        out: a ``target`` of as many rows and columns.
    """
    convert = _compiled().convert
    for lanes, start, count in _steps(values.columns, CONVERTED):
        read, write = values.address + _BFLOAT_BYTES * start, out.address + start
        convert[lanes](read, values.stride, write, out.stride, values.rows, count, multiplier)


_compiling = threading.Lock()
"""Held while the loops are looked up, so that only one thread compiles them."""


def _loops() -> Loops | None:
    with _compiling:
        return _compiled_once()


@cache
def _compiled_once() -> Loops | None:
    try:
        return compile_loops()
    except Exception as error:  # No llvmlite, or one whose LLVM speaks another dialect.
        logger.info("StreamFP8: fp8 conversion on the CPU is left to torch (%s: %s).", type(error).__name__, error)
        return None


def _compiled() -> Loops:
    loops = _loops()
    if loops is None:
        raise RuntimeError("there are no compiled loops, and so no matrix to give them")
    return loops


def _matrix(tensor: torch.Tensor) -> Matrix | None:
    if not tensor.is_cpu or not tensor.numel():
        return None
    if tensor.dim() == 2:
        (rows, columns), (stride, step) = tensor.shape, tensor.stride()
        if step == 1:
            return Matrix(tensor.data_ptr(), rows, columns, stride)
    size = tensor.numel()
    return Matrix(tensor.data_ptr(), 1, size, size) if tensor.is_contiguous() else None


def _steps(columns: int, lanes: int) -> Iterator[tuple[int, int, int]]:
    """Lanes, start and number of columns: as many whole vectors as there are, and the rest one at a time."""
    vectors = columns // lanes * lanes
    if vectors:
        yield lanes, 0, vectors
    if vectors < columns:
        yield 1, vectors, columns - vectors
