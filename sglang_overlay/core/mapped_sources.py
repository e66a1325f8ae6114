# SPDX-License-Identifier: Apache-2.0
"""Which memory belongs to the checkpoint, and so may still be read when a weight loader has returned.

Memory that a model's code made on the way may be used again at once. What lies in a mapped file costs nothing while it
waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sglang_overlay.core.sources import CheckpointSources

_MAPS = Path("/proc/self/maps")


@dataclass
class _Mapping:
    """Addresses that are mapped as one. ``witness`` is a storage that keeps a file's mapping while it lives."""

    start: int
    stop: int
    is_file: bool
    witness: StorageWeakRef

    def holds(self, address: int) -> bool:
        # That other memory has become a file since is not noticed: then a copy is made that was not needed.
        return self.start <= address < self.stop and not (self.is_file and self.witness.expired())


class Watch:
    """Tells whether a tensor, or any view of the same memory, is changed from now on; keeps it alive.

    By torch's version counter, so blind to tensors made in inference mode and to writes that bypass torch.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._version = self._count()

    @property
    def has_changed(self) -> bool:
        """Whether anything was written to the memory since."""
        return self._count() != self._version

    def _count(self) -> int:
        return 0 if self._tensor.is_inference() else self._tensor._version


class MappedSources(CheckpointSources):
    """The checkpoint's storages, and which of them cost no memory."""

    def __init__(self) -> None:
        super().__init__()
        self._mapping: _Mapping | None = None

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a view of memory that was offered."""
        return tensor.untyped_storage()._cdata in self._sources

    def is_mapped(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a view of offered memory that is a mapped file: keeping it costs no memory."""
        source = self._sources.get(tensor.untyped_storage()._cdata)
        if source is None or not tensor.is_cpu or not tensor.numel():
            return False
        address = tensor.data_ptr()
        with self._lock:
            known = self._mapping
            if known is None or not known.holds(address):
                found = mapping_at(address)
                if found is None:
                    return False
                known = self._mapping = _Mapping(*found, source.reference)
            # The newest storage is the likeliest to be alive when the next one comes, and then it vouches for that one.
            known.witness = source.reference
            return known.is_file


def mapping_at(address: int) -> tuple[int, int, bool] | None:
    """Start and stop of the mapping at ``address``, and whether it is a file on disk; None where nothing tells.

    Slow: the kernel writes down all mappings of the process.
    """
    if not _MAPS.exists():
        return None
    for line in _MAPS.read_text().splitlines():
        span, _, rest = line.partition(" ")
        start, stop = (int(bound, 16) for bound in span.split("-"))
        if start <= address < stop:
            path = rest.split(maxsplit=4)[4:]
            return start, stop, bool(path) and path[0].startswith("/") and not path[0].startswith("/dev/")
    return None
