# SPDX-License-Identifier: Apache-2.0
"""Huge pages under memory that is about to be filled: one page fault for 2 MiB in place of 512.

On the CPU, a load from the page cache spends a third of its time in page faults of the memory it fills. Linux gives
huge pages to whoever asks for them (``madvise``), unless the machine's owner has switched them off; but where none is
free it makes room first, which costs more than all the faults. So no more are asked for than are free.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache
from pathlib import Path

import torch

_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
_FREE = Path("/proc/buddyinfo")


class HugePages:
    """Asks for huge pages, a hint that never fails, until ``free`` bytes have been asked for."""

    def __init__(self, free: int) -> None:
        self._free = free
        self._size = huge_page_bytes()

    def request(self, tensor: torch.Tensor) -> None:
        """Ask for those that lie inside ``tensor`` as a whole, so that it takes no more memory than before."""
        if not self._size or not self._free or tensor.device.type != "cpu":
            return
        start = -(-tensor.data_ptr() // self._size) * self._size
        stop = (tensor.data_ptr() + tensor.nbytes) // self._size * self._size
        if 0 < stop - start <= self._free:
            self._free -= stop - start
            _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_HUGEPAGE)


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


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
