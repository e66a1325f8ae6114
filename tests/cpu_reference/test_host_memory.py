# SPDX-License-Identifier: Apache-2.0
"""Pages of freed memory go back to the system."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from sglang_overlay.cpu_reference import host_memory
from sglang_overlay.cpu_reference.host_memory import TrimLate, trim

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
    trim()
    released = before - resident()
    for block in blocks[1::2]:
        libc.free(ctypes.c_void_p(block))
    assert released > COUNT // 2 * BLOCK // 2


@pytest.mark.parametrize("steps", [[1] * 80, [69, 1, 10], [80], [100, 100], [0, 71, 0, 9]])
def test_pages_go_back_once_when_most_of_a_load_is_done(monkeypatch, steps):
    done, given = [], []
    monkeypatch.setattr(host_memory, "trim", lambda: given.append(sum(done)))
    late = TrimLate(80)
    for step in steps:
        done.append(step)
        late.advance(step)
    assert len(given) == 1
    # With the step that brings the load there.
    assert given[0] - max(steps) < 70 <= given[0]


def test_pages_stay_where_a_load_ends_early(monkeypatch):
    given = []
    monkeypatch.setattr(host_memory, "trim", lambda: given.append(1))
    TrimLate(80).advance(69)
    assert given == []
