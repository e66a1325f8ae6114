# SPDX-License-Identifier: Apache-2.0
"""Huge pages are asked for inside the tensor only, and no more of them than are free."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from sglang_overlay.core import huge_pages
from sglang_overlay.core.huge_pages import HugePages, free_huge_pages, huge_page_bytes

SIZE = huge_page_bytes()
needs_huge_pages = pytest.mark.skipif(not SIZE, reason="this kernel has no huge pages")


@pytest.fixture
def tensor():
    return torch.empty(6 * SIZE + 12345, dtype=torch.uint8)


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
    pages, other = HugePages(8 * SIZE), torch.empty_like(tensor)
    pages.request(tensor)
    pages.request(other)
    assert advised(tensor.data_ptr() + 2 * SIZE)
    assert not advised(other.data_ptr() + 2 * SIZE)


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
