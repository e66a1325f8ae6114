# SPDX-License-Identifier: Apache-2.0
"""Per-tensor fp8 quantization of contiguous bfloat16 on the CPU, in one pass over memory and without Python's lock.

torch converts to float8_e4m3fn one element at a time, and that would be half of a load. These loops give the same bits:
``c10/util/Float8_e4m3fn.h`` of PyTorch says how it rounds (to nearest, ties to even; subnormals by adding a power of
two whose last place is theirs). numba, which SGLang depends on, compiles them once a machine; without it, torch does
the work.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

_CHUNK = 4096
"""Elements converted at a time: the intermediate stays in the first-level cache."""

_SUBNORMAL_BELOW = np.uint32(121 << 23)
_SUBNORMAL_BIAS = np.uint32(141 << 23)
_SUBNORMAL_SHIFT = np.float32(2.0**14)
_NORMAL_BIAS = np.uint32((((7 - 127) << 23) + 0x7FFFF) % 2**32)


def applies_to(values: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether ``quantize`` can take these two."""
    return (
        _ready.is_set()
        and values.dtype == torch.bfloat16
        and out.dtype == torch.float8_e4m3fn
        and values.device.type == out.device.type == "cpu"
        and values.is_contiguous()
        and out.is_contiguous()
    )


def quantize(values: torch.Tensor, multiplier: float, out: torch.Tensor) -> None:
    """Write ``values * multiplier`` as fp8, the product rounded to float32 first.

    No product may exceed 448 by more than rounding: nothing saturates here.

    Args:
        values: bfloat16, contiguous, any shape.
        multiplier: exact in float32.
        out: float8_e4m3fn, contiguous, of the same shape.
    """
    _compiled()(
        values.reshape(-1).view(torch.uint16).numpy(),
        np.float32(multiplier),
        out.view(-1).view(torch.uint8).numpy(),
    )


_ready = threading.Event()


@cache
def prepare() -> threading.Thread:
    """Get the loops compiled beside whatever else happens; until then, and without numba, ``applies_to`` says no."""
    thread = threading.Thread(target=_compile, name="fp8-loops", daemon=True)
    thread.start()
    return thread


def _compile() -> None:
    if find_spec("numba") is not None:
        quantize(torch.ones(1, dtype=torch.bfloat16), 1.0, torch.empty(1, dtype=torch.float8_e4m3fn))
        _ready.set()


@cache
def _compiled() -> Callable[[Any, Any, Any], None]:
    import numba

    try:
        found: Callable[[Any, Any, Any], None] = numba.njit(nogil=True, cache=True)(_loops)
    except RuntimeError:
        # Neither this package's folder nor the user's cache can be written to.
        found = numba.njit(nogil=True)(_loops)
    return found


def _loops(values: Any, multiplier: Any, out: Any) -> None:
    # Each loop stores into 32-bit memory: numba computes integers in 64 bits, and storing narrows them again, which is
    # what lets the compiler use whole vectors.
    products = np.empty(_CHUNK, dtype=np.float32)
    shifted = np.empty(_CHUNK, dtype=np.float32)
    bits = products.view(np.uint32)
    subnormal = shifted.view(np.uint32)
    for start in range(0, values.size, _CHUNK):
        count = min(_CHUNK, values.size - start)
        source = values[start : start + count]
        target = out[start : start + count]
        for i in range(count):
            bits[i] = np.uint32(source[i]) << np.uint32(16)
        for i in range(count):
            products[i] = products[i] * multiplier
            shifted[i] = abs(products[i]) + _SUBNORMAL_SHIFT
        for i in range(count):
            whole = bits[i]
            magnitude = np.uint32(whole & np.uint32(0x7FFFFFFF))
            odd = np.uint32((magnitude >> np.uint32(20)) & np.uint32(1))
            normal = np.uint32(np.uint32(magnitude + odd + _NORMAL_BIAS) >> np.uint32(20))
            small = np.uint32(subnormal[i] - _SUBNORMAL_BIAS)
            sign = np.uint32((whole >> np.uint32(24)) & np.uint32(0x80))
            bits[i] = np.uint32((small if magnitude < _SUBNORMAL_BELOW else normal) | sign)
        for i in range(count):
            target[i] = np.uint8(bits[i])
