# SPDX-License-Identifier: Apache-2.0
"""Memory that has been freed and still counts as the process's.

Upstream makes tensors of some megabytes on the way: DeepSeek's loader fuses two weights, of which a dozen may wait for
its threads at once, and high-precision layers are let go of when they have been quantized. Where these lay between
memory that stays, the C library keeps their pages.
"""

from __future__ import annotations

import ctypes
from functools import cache


def give_back() -> None:
    """Return such pages to the system, where the C library knows how (glibc); a matter of milliseconds."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
