# SPDX-License-Identifier: Apache-2.0
"""KV pools of releases that ask the platform for them (until 0.5.21): SGLang's own, called as for a device's own."""

from __future__ import annotations

from typing import Any


def heads() -> type:
    """The pool of multi-head attention."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    found: type = MHATokenToKVPool
    return found


def latent() -> type:
    """The pool of MLA."""
    from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

    class LatentPool(MLATokenToKVPool):  # type: ignore[misc]
        def __init__(self, *args: Any, index_head_dim: int | None = None, **kwargs: Any) -> None:
            if index_head_dim is not None:
                raise NotImplementedError("the CPU reference platform has no sparse attention with an index of its own")
            super().__init__(*args, **kwargs)

    return LatentPool


def slots() -> type:
    """The allocator of pools whose pages are one token each; the one for larger pages is made of Triton kernels."""
    from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

    class SlotAllocator(TokenToKVPoolAllocator):  # type: ignore[misc]
        def __init__(self, size: int, *, page_size: int, **kwargs: Any) -> None:
            if page_size != 1:
                raise NotImplementedError(f"the CPU reference platform has pages of one token, not of {page_size}")
            super().__init__(size, **kwargs)

    return SlotAllocator
