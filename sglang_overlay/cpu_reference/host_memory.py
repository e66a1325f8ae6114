# SPDX-License-Identifier: Apache-2.0
"""What torch has no words for in memory of the CPU: when pages come, and when they go."""

from __future__ import annotations

import ctypes
import mmap
import threading
from functools import cache

import torch


def zeros_on_demand(like: torch.Tensor) -> torch.Tensor:
    """Zeros of the shape and dtype of ``like``, in pages that come when they are written; until then they cost nothing.

    Where the whole is written anyway, zeroing it first would be a pass over memory for nothing.
    """
    if not like.nbytes:
        return torch.zeros_like(like, device="cpu")
    pages = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(like.dtype).view(like.shape)


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
