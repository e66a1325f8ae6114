# SPDX-License-Identifier: Apache-2.0
"""Host memory that one rank needs for the tensors it reads, depending on how SGLang reads them.

The pages of a mapped file belong to the page cache: the system can drop them and read them again. Other reads are in
the process's own memory until the model's loader drops the tensors of a file, or all of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from sglang_overlay.offline.plan.checkpoint import WeightFile

THREADS = 8
"""``DefaultModelLoader.DEFAULT_NUM_THREADS``."""
_AT_ONCE = THREADS + 2
"""Most files that ``buffered_multi_thread_safetensors_weights_iterator`` holds: being read, waiting, and yielded."""


@dataclass(frozen=True)
class HostMemory:
    """Peak host memory, in bytes, that one rank needs for the tensors it reads, in addition to the page cache.

    Attributes:
        held: checkpoint tensors that the model's loader keeps at once; all of them if it sorts or collects them first.
        unmapped: with ``--weight-loader-disable-mmap``, in 8 threads: each file is held twice while it is read.
        pickled: from ``.bin`` or ``.pt`` files, in 8 threads: SGLang keeps all of them until the last is loaded.
    """

    held: int
    unmapped: int
    pickled: int

    @classmethod
    def of(cls, files: Sequence[WeightFile], held: int) -> HostMemory:
        """For a checkpoint's files in reading order, and the bytes (``held``) that the model's loader keeps."""
        sizes = [sum(tensor.size for tensor in file.tensors) for file in files]
        windows = (sizes[start : start + _AT_ONCE] for start in range(max(1, len(sizes) - _AT_ONCE + 1)))
        most = max(sum(window) + sum(sorted(window)[-THREADS:]) for window in windows)
        return cls(held, min(most + held, sum(sizes) + sum(sorted(sizes)[-THREADS:])), sum(sizes))


class HeldTensors:
    """Counts the memory of checkpoint tensors that are still referenced."""

    def __init__(self) -> None:
        self.peak = 0
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._now = 0
        self._given = 0

    def give(self, tensor: torch.Tensor, known: Collection[torch.Tensor]) -> None:
        """Note a tensor that is about to be loaded; ``known`` tensors do not count: the caller keeps them."""
        self.peak = max(self.peak, self._now - sum(other.nbytes for other in known))
        storage = tensor.untyped_storage()
        key, size = storage._cdata, tensor.nbytes
        self._references[key] = weakref.ref(storage, lambda _: self._let_go(key, size))
        self._now += size
        self._given += size

    def finish(self) -> None:
        """Note that all tensors have been given."""
        if self._now == self._given:
            self.peak = self._given

    def _let_go(self, key: int, size: int) -> None:
        self._now -= size
        del self._references[key]
