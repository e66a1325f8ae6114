# SPDX-License-Identifier: Apache-2.0
"""Which memory belongs to the checkpoint, and so may still be read when a weight loader has returned.

Upstream hands the same tensors to thread pools of its own (``maybe_executor_submit``), so they outlive the iteration.
Memory that a model's code made on the way may be used again at once.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(frozen=True)
class _Source:
    reference: StorageWeakRef
    is_mapped: bool


class CheckpointSources:
    """Remembers the checkpoint's storages without keeping them alive. ``_lock`` guards changes of ``_sources``."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: dict[int, _Source] = {}

    def offer(self, tensor: torch.Tensor) -> None:
        """Note that ``tensor`` comes from the checkpoint."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._sources:
            return
        # The weak reference also keeps the number from being given to other memory.
        found = _Source(StorageWeakRef(storage), is_file_mapped(tensor))  # type: ignore[no-untyped-call]
        with self._lock:
            living = {key: source for key, source in self._sources.items() if not source.reference.expired()}
            self._sources = {**living, storage._cdata: found}

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a view of memory that was offered."""
        return tensor.untyped_storage()._cdata in self._sources

    def is_mapped(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a view of offered memory that is a mapped file: keeping it costs no memory."""
        source = self._sources.get(tensor.untyped_storage()._cdata)
        return source is not None and source.is_mapped


def is_file_mapped(tensor: torch.Tensor) -> bool:
    """Whether a CPU tensor's memory is a mapping of a file on disk; False where the system does not tell."""
    maps = Path("/proc/self/maps")
    if tensor.device.type != "cpu" or not tensor.numel() or not maps.exists():
        return False
    address = tensor.data_ptr()
    for line in maps.read_text().splitlines():
        span, _, rest = line.partition(" ")
        start, _, stop = span.partition("-")
        if int(start, 16) <= address < int(stop, 16):
            path = rest.split(maxsplit=4)[4:]
            return bool(path) and path[0].startswith("/") and not path[0].startswith("/dev/")
    return False
