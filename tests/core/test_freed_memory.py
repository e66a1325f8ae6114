# SPDX-License-Identifier: Apache-2.0
"""Pages of freed memory that lie between memory in use."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from sglang_overlay.core.freed_memory import give_back

BLOCK = 96 << 10
"""Less than malloc maps by itself, more than a page."""
COUNT = 1000


def resident():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps pages, and has malloc_trim")
def test_pages_between_memory_in_use_go_back_to_the_system():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks = [libc.malloc(ctypes.c_size_t(BLOCK)) for _ in range(COUNT)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks[::2]:
        libc.free(ctypes.c_void_p(block))
    before = resident()
    give_back()
    released = before - resident()
    for block in blocks[1::2]:
        libc.free(ctypes.c_void_p(block))
    assert released > COUNT // 2 * BLOCK // 2
