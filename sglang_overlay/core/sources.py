# SPDX-License-Identifier: Apache-2.0
"""Find the checkpoint tensor that memory belongs to, and memory that stays unchanged after a weight loader returns.

Loaders receive views of checkpoint tensors, some in thread pools of upstream's (``maybe_executor_submit``), so names
are kept while the memory lives, not for one iteration. Files from ``torch.save`` may hold anything: numbers, dicts,
tensors without storage (sparse ones), several tensors in one storage.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sglang_overlay.core.mapped_files import MappedFiles

_SWEEP_AT_LEAST = 256


class _Place(NamedTuple):
    """Where a checkpoint tensor lies in its storage.

    Attributes:
        start: byte offset.
        size: bytes of an element.
        strides, shape: of the tensor.
    """

    name: str
    start: int
    size: int
    strides: Sequence[int]
    shape: Sequence[int]

    def holds(self, start: int) -> bool:
        """Whether an element of the tensor begins at this byte of the storage."""
        steps = sorted(zip(self.strides, self.shape, strict=True), reverse=True)
        rest = start - self.start
        for stride, length in ((stride * self.size, length) for stride, length in steps if stride):
            rest -= min(rest // stride, length - 1) * stride if rest > 0 else 0
        return rest == 0


@dataclass(frozen=True)
class _Source:
    reference: StorageWeakRef
    places: list[_Place] = field(default_factory=list)


class CheckpointSources:
    """Remembers the checkpoint's storages without keeping them alive.

    ``_lock`` guards changes; readers see a dictionary that only grows, or a whole new one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: dict[int, _Source] = {}
        self._files = MappedFiles()
        self._sweep_at = _SWEEP_AT_LEAST

    def offer(self, tensor: object, name: str = "") -> None:
        """Note that ``tensor`` comes from the checkpoint, named ``name`` there. Values without storage are ignored."""
        if not isinstance(tensor, torch.Tensor) or oddity(tensor) is not None:
            return
        storage = tensor.untyped_storage()
        with self._lock:
            source = self._sources.get(storage._cdata)
            if source is None:
                # The weak reference also keeps the key from being reused for other memory.
                source = self._sources[storage._cdata] = _Source(StorageWeakRef(storage))
            if name:
                place = _Place(name, _start(tensor), tensor.element_size(), tensor.stride(), tensor.shape)
                source.places.append(place)
            if len(self._sources) >= self._sweep_at:
                self._sweep()

    def name_of(self, tensor: torch.Tensor) -> str:
        """The checkpoint's name for the tensor that ``tensor`` is a view of; empty for other memory."""
        source = self._source_of(tensor)
        if source is None or not source.places:
            return ""
        if len(source.places) == 1:
            return source.places[0].name
        start = _start(tensor)
        # The newest is being loaded.
        return next((place.name for place in reversed(source.places) if place.holds(start)), "")

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a view of the checkpoint's memory, which nobody reuses while it lives."""
        return self._source_of(tensor) is not None

    def is_mapped(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a view of checkpoint memory in a mapped file: keeping it costs no memory."""
        source = self._source_of(tensor)
        if source is None or not tensor.is_cpu or not tensor.numel():
            return False
        return self._files.holds(tensor.data_ptr(), source.reference)

    def _source_of(self, tensor: torch.Tensor) -> _Source | None:
        try:
            return self._sources.get(tensor.untyped_storage()._cdata)
        except RuntimeError:
            return None  # It has no storage.

    def _sweep(self) -> None:
        living = {key: source for key, source in self._sources.items() if not source.reference.expired()}
        self._sources = living
        self._sweep_at = max(_SWEEP_AT_LEAST, 2 * len(living))


class Watch:
    """Detects changes to a tensor, or to any view of it, from now on; keeps the tensor alive.

    Uses torch's version counter, so it misses tensors made in inference mode and writes that bypass torch.
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


def _start(tensor: torch.Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def oddity(value: object) -> str | None:
    """Describes a checkpoint entry that is not a plain tensor in memory; None for one that is."""
    if isinstance(value, dict):
        return f"a dict of {len(value)} entries"
    if not isinstance(value, torch.Tensor):
        return "None" if value is None else f"of type {type(value).__name__}"
    if value.is_meta:
        return "a tensor without data"
    if value.layout is not torch.strided or value.is_nested:
        return f"a tensor of layout {'nested' if value.is_nested else str(value.layout).removeprefix('torch.')}"
    return None
