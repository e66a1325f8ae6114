# SPDX-License-Identifier: Apache-2.0
"""Find out which memory is a mapped file: keeping a reference to that costs no memory."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from torch.multiprocessing.reductions import StorageWeakRef

_MAPS = Path("/proc/self/maps")


@dataclass
class _Mapping:
    """One mapping of the process. ``witness`` is a storage that keeps the file mapped while it lives."""

    start: int
    stop: int
    is_file: bool
    witness: StorageWeakRef

    @property
    def is_living_file(self) -> bool:
        return self.is_file and not self.witness.expired()

    def holds(self, address: int) -> bool:
        # If other memory has become a file mapping since, this misses it, which costs only a needless copy.
        return self.start <= address < self.stop and (self.is_living_file or not self.is_file)


class MappedFiles:
    """Finds out which memory is a mapped file. ``_lock`` guards the known mappings: loaders alternate between files."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mappings: list[_Mapping] = []

    def holds(self, address: int, witness: StorageWeakRef) -> bool:
        """Whether ``address`` lies in a mapped file. The storage ``witness`` keeps that file mapped while it lives."""
        with self._lock:
            known = next((mapping for mapping in self._mappings if mapping.holds(address)), None)
            if known is None:
                found = mapping_at(address)
                if found is None:
                    return False
                known = _Mapping(*found, witness)
                self._mappings = [known, *(mapping for mapping in self._mappings if mapping.is_living_file)]
            # The newest storage is the likeliest to be alive at the next call.
            known.witness = witness
            return known.is_file


def mapping_at(address: int) -> tuple[int, int, bool] | None:
    """Start and stop of the mapping at ``address``, and whether it is a file on disk; None if unknown.

    The kernel generates the list while it is read, thousands of mappings sorted by address. Recent mappings tend to
    come first, so reading usually stops early.
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
