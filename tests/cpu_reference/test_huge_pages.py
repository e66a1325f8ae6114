# SPDX-License-Identifier: Apache-2.0
"""Huge pages are asked for inside the tensor only, no more of them than are free, and no longer than they are fast."""

from __future__ import annotations

import itertools
import mmap
from pathlib import Path

import pytest
import torch

from sglang_overlay.cpu_reference import huge_pages
from sglang_overlay.cpu_reference.host_memory import zeros_on_demand
from sglang_overlay.cpu_reference.huge_pages import SLOW_SECONDS, HugePages, free_huge_pages, huge_page_bytes

SIZE = huge_page_bytes()
needs_huge_pages = pytest.mark.skipif(not SIZE, reason="this kernel has no huge pages")


def untouched():
    """A tensor in pages of its own: what malloc gives may have been advised for a tensor that is gone."""
    return zeros_on_demand(torch.empty(6 * SIZE + 12345, dtype=torch.uint8, device="meta"))


@pytest.fixture
def tensor():
    return untouched()


def advised(address: int) -> bool:
    """Whether the kernel was asked for huge pages at ``address``: the flag "hg" of its mapping."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(bound, 16) for bound in first.split("-"))
            inside = start <= address < stop
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("no mapping there")


@needs_huge_pages
def test_whole_pages_inside_are_asked_for_and_those_at_the_ends_are_not(tensor):
    HugePages(8 * SIZE).request(tensor)
    start = -(-tensor.data_ptr() // SIZE) * SIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // SIZE * SIZE
    assert advised(start)
    assert advised(stop - 1)
    assert not advised(tensor.data_ptr())
    assert not advised(stop)


@needs_huge_pages
def test_no_more_are_asked_for_than_are_free(tensor):
    pages, other = HugePages(8 * SIZE), untouched()
    pages.request(tensor)
    pages.request(other)
    assert advised(tensor.data_ptr() + 2 * SIZE)
    assert not advised(other.data_ptr() + 2 * SIZE)


@needs_huge_pages
def test_what_is_written_stays_when_its_pages_are_used_again(tensor):
    pages = HugePages(8 * SIZE)
    pages.request(tensor)
    tensor.fill_(7)
    pages.use(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)
    assert bool((tensor == 7).all())


@needs_huge_pages
def test_pages_are_used_once_and_those_of_other_tensors_never(tensor):
    times = []
    pages, other = HugePages(8 * SIZE, clock=lambda: times.append(0) or 0.0), untouched()
    pages.request(tensor)
    start = -(-tensor.data_ptr() // SIZE) * SIZE
    for begin, stop, used in ((start, start + 1, 1), (start, start + SIZE + 1, 2), (start, start + SIZE + 1, 2)):
        pages.use(begin, stop)
        assert len(times) == 2 * used
    pages.use(other.data_ptr(), other.data_ptr() + other.nbytes)
    assert len(times) == 4


@needs_huge_pages
def test_none_are_asked_for_any_more_once_one_was_slow(tensor):
    times = itertools.count(step=2 * SLOW_SECONDS)
    pages, other = HugePages(100 * SIZE, clock=lambda: next(times)), untouched()
    pages.request(tensor)
    start = -(-tensor.data_ptr() // SIZE) * SIZE
    assert advised(start + 2 * SIZE)
    pages.use(start, start + 5 * SIZE)
    pages.request(other)
    assert not advised(start + 2 * SIZE)
    assert not advised(other.data_ptr() + 2 * SIZE)
    assert next(times) == 4 * SLOW_SECONDS


@needs_huge_pages
def test_tensors_smaller_than_a_page_are_left_alone():
    pages = HugePages(8 * SIZE)
    pages.request(torch.empty(SIZE // 2, dtype=torch.uint8))
    assert pages._free == 8 * SIZE


@needs_huge_pages
def test_free_pages_are_read_from_the_kernels_table(tmp_path, monkeypatch):
    table = tmp_path / "buddyinfo"
    monkeypatch.setattr(huge_pages, "_FREE", table)
    monkeypatch.setattr(huge_pages, "huge_page_bytes", lambda: mmap.PAGESIZE << 9)
    table.write_text(
        "Node 0, zone    DMA32     11      22      0      0      0      0      0      0      9      3      1\n"
        "Node 1, zone   Normal     11      22      0      0      0      0      0      0      9      0      2\n"
    )
    assert free_huge_pages() == (3 + 2 * (1 + 2)) * (mmap.PAGESIZE << 9)


def test_a_kernel_that_does_not_tell_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(huge_pages, "_FREE", tmp_path / "missing")
    assert free_huge_pages() == 0
