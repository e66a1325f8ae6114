# SPDX-License-Identifier: Apache-2.0
"""Which checkpoint tensor a piece of memory belongs to.

Weight loaders pass on views of it, some from thread pools of their own (``maybe_executor_submit``), so names are kept
as long as the memory lives, not for an iteration.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_SWEEP_AT_LEAST = 256


@dataclass(frozen=True)
class _Source:
    reference: StorageWeakRef
    name: str


class CheckpointSources:
    """Remembers the checkpoint's storages without keeping them alive.

    ``_lock`` guards changes; readers see a dictionary that only grows, or a whole new one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: dict[int, _Source] = {}
        self._sweep_at = _SWEEP_AT_LEAST

    def offer(self, tensor: torch.Tensor, name: str = "") -> None:
        """Note that ``tensor`` comes from the checkpoint, under ``name`` there."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._sources:
            return
        # The weak reference also keeps the number from being given to other memory.
        reference = StorageWeakRef(storage)
        with self._lock:
            self._sources[storage._cdata] = _Source(reference, name)
            if len(self._sources) >= self._sweep_at:
                self._sweep()

    def name_of(self, tensor: torch.Tensor) -> str:
        """The name in the checkpoint of the tensor that ``tensor`` is a view of; empty for other memory."""
        source = self._sources.get(tensor.untyped_storage()._cdata)
        return "" if source is None else source.name

    def _sweep(self) -> None:
        living = {key: source for key, source in self._sources.items() if not source.reference.expired()}
        self._sources = living
        self._sweep_at = max(_SWEEP_AT_LEAST, 2 * len(living))
