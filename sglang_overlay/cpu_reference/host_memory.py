# SPDX-License-Identifier: Apache-2.0
"""When freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import threading
from functools import cache


def trim() -> None:
    """Return pages of freed memory to the system that the C library keeps, where it can (glibc); takes milliseconds.

    Upstream makes tensors of some megabytes on the way: DeepSeek's loader fuses two weights, of which a dozen may wait
    for its threads at once. Those that lay between memory that stays still count as the process's.
    """
    trim = getattr(libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


class TrimLate:
    """Gives freed pages back once, when seven eighths of a load are done: at its peak they would be on top.

    More often would cost more than it brings: pages that are needed again have to be got again. Any thread may call;
    ``_lock`` guards ``_left``.

    Args:
        size: bytes that the load will write.
    """

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        self._left = size * 7 // 8

    def advance(self, size: int) -> None:
        """Note ``size`` bytes more as done."""
        with self._lock:
            is_due = 0 < self._left <= size
            self._left -= size
        if is_due:
            trim()


@cache
def libc() -> ctypes.CDLL:
    """The C library of this process."""
    return ctypes.CDLL(None)
