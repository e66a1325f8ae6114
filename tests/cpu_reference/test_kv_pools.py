"""What releases that ask the platform for KV pools get: SGLang's own, with the arguments of a device's own."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import sglang  # noqa: F401 (before the platform's modules, as in any process of SGLang's)
import torch

from sglang_overlay.cpu_reference import groups, kv_pools


def test_slots_are_handed_out_and_taken_back() -> None:
    pool = SimpleNamespace(get_kv_size_bytes=lambda: 0)
    allocator = kv_pools.slots()(8, page_size=1, dtype=torch.float32, device="cpu", kvcache=pool, need_sort=False)
    taken = allocator.alloc(3)
    assert len(set(taken.tolist())) == 3
    assert allocator.available_size() == 5
    allocator.free(taken)
    assert allocator.available_size() == 8


def test_pages_of_several_tokens_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="not of 16"):
        kv_pools.slots()(8, page_size=16, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False)


def test_pool_of_mla_has_no_index() -> None:
    with pytest.raises(NotImplementedError, match="sparse attention"):
        kv_pools.latent()(8, page_size=1, index_head_dim=128)


def test_groups_never_use_nccl() -> None:
    asked: list[dict[str, object]] = []
    groups.without_nccl(lambda *ranks, **options: asked.append(options), [[0]], use_pynccl=True, group_name="tp")
    groups.without_nccl(lambda *ranks, **options: asked.append(options), [[0]])
    assert asked == [{"use_pynccl": False, "group_name": "tp"}, {"use_pynccl": False}]
