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

    @property
    def is_living_file(self) -> bool:
        return self.is_file and not self.witness.expired()

    def holds(self, address: int) -> bool:
        # That other memory has become a file since is not noticed: then a copy is made that was not needed.
        return self.start <= address < self.stop and (self.is_living_file or not self.is_file)


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
    """The checkpoint's storages, and which of them cost no memory.

    ``_lock`` guards the known mappings as well: of some files, which loaders may read by turns.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mappings: list[_Mapping] = []

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a view of memory that was offered."""
        return self._source_of(tensor) is not None

    def is_mapped(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a view of offered memory that is a mapped file: keeping it costs no memory."""
        source = self._source_of(tensor)
        if source is None or not tensor.is_cpu or not tensor.numel():
            return False
        address = tensor.data_ptr()
        with self._lock:
            known = next((mapping for mapping in self._mappings if mapping.holds(address)), None)
            if known is None:
                found = mapping_at(address)
                if found is None:
                    return False
                known = _Mapping(*found, source.reference)
                self._mappings = [known, *(mapping for mapping in self._mappings if mapping.is_living_file)]
            # The newest storage is the likeliest to be alive when the next one comes, and then it vouches for that one.
            known.witness = source.reference
            return known.is_file


def mapping_at(address: int) -> tuple[int, int, bool] | None:
    """Start and stop of the mapping at ``address``, and whether it is a file on disk; None where nothing tells.

    The kernel writes down the process's mappings, thousands of them, in the order of their addresses, as they are read;
    what has been mapped last tends to come first.
    """
    try:
        with _MAPS.open("rb") as mappings:
            for line in mappings:
                span, _, rest = line.partition(b" ")
                start, _, stop = span.partition(b"-")
                if address < int(stop, 16):
                    return _described(int(start, 16), int(stop, 16), rest) if int(start, 16) <= address else None
    except OSError:
        pass
    return None


def _described(start: int, stop: int, rest: bytes) -> tuple[int, int, bool]:
    path = rest.split(maxsplit=4)[4:]
    return start, stop, bool(path) and path[0].startswith(b"/") and not path[0].startswith(b"/dev/")
