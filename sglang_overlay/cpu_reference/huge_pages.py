# SPDX-License-Identifier: Apache-2.0
"""Huge pages under memory that is about to be filled: one page fault for 2 MiB in place of 512.

On the CPU, a load from the page cache spends a third of its time in page faults of the memory it fills. Linux gives
huge pages to whoever asks for them (``madvise``), unless the machine's owner has switched them off; but where none is
free it makes room first, which costs more than all the faults. So no more are asked for than are free.

Nor any longer than they are fast. A virtual machine whose host takes free blocks back (free page reporting) gets each
of them again in 4 to 6 ms, while it still has the memory that small pages come from: a load in a new process would take
twice as long.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from sglang_overlay.cpu_reference.host_memory import libc

_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_FREE = Path("/proc/buddyinfo")

SLOW_SECONDS = 0.0015
"""To get a huge page: twice what 512 small ones take. One that the machine has takes a tenth of this."""

_POPULATE_WRITE = 23
"""``madvise``: fault pages in, as a write would that changes nothing. From Linux 5.14 on; before that an error."""


class HugePages:
    """Asks for huge pages, a hint that never fails, until ``free`` bytes have been asked for or one was slow to come.

    Any thread may call. ``_lock`` guards ``_free``, what may still be asked for, and ``_asked``, the memory for which
    that was done, and is held while they are given up; ``_waiting``, the pages that nobody has used yet, changes by
    single operations on a set.
    """

    def __init__(self, free: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._free = free
        self._clock = clock
        self._size = huge_page_bytes()
        self._lock = threading.Lock()
        self._asked: list[tuple[int, int]] = []
        self._waiting: set[int] = set()

    def request(self, tensor: torch.Tensor) -> None:
        """Ask for those that lie inside ``tensor`` as a whole, so that it takes no more memory than before."""
        if not self._size or not self._free or tensor.device.type != "cpu":
            return
        start = -(-tensor.data_ptr() // self._size) * self._size
        stop = (tensor.data_ptr() + tensor.nbytes) // self._size * self._size
        with self._lock:
            if 0 < stop - start <= self._free:
                self._free -= stop - start
                _advise(start, stop, mmap.MADV_HUGEPAGE)
                self._asked.append((start, stop))
                self._waiting.update(range(start // self._size, stop // self._size))

    def use(self, start: int, stop: int) -> None:
        """Get those under addresses that are about to be written; after a slow one, what is left has small pages."""
        if not self._waiting:
            return
        for page in range(start // self._size, -(-stop // self._size)):
            if page not in self._waiting:
                continue
            self._waiting.discard(page)
            begun = self._clock()
            _advise(page * self._size, (page + 1) * self._size, _POPULATE_WRITE)
            if self._clock() - begun > SLOW_SECONDS:
                self._give_up()
                return

    def _give_up(self) -> None:
        with self._lock:
            self._free = 0
            self._waiting.clear()
            for start, stop in self._asked:
                _advise(start, stop, mmap.MADV_NOHUGEPAGE)
            self._asked.clear()


def _advise(start: int, stop: int, advice: int) -> None:
    libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


@cache
def huge_page_bytes() -> int:
    """Size of a huge page; 0 where there are none."""
    return int(_SIZE.read_text()) if hasattr(mmap, "MADV_HUGEPAGE") and _SIZE.exists() else 0


def free_huge_pages() -> int:
    """Bytes of free memory that lie in whole huge pages, as far as the kernel tells; 0 where it does not."""
    size = huge_page_bytes()
    if not size:
        return 0
    try:
        zones = _FREE.read_text().splitlines()
    except OSError:
        return 0
    return sum(_bytes_in_blocks(zone, size) for zone in zones)


def _bytes_in_blocks(zone: str, at_least: int) -> int:
    """Bytes in free blocks of a zone, which are counted by size: one page, two, four, ..."""
    _, _, _, _, *counts = zone.split()  # Node 0, zone Normal 12685 141330 77886 ...
    sizes = [mmap.PAGESIZE << order for order in range(len(counts))]
    return sum(int(count) * size for count, size in zip(counts, sizes, strict=True) if size >= at_least)
