# SPDX-License-Identifier: Apache-2.0
"""Capture the operations of upstream's loaders during a weight update.

Writes to placeholders go to their sinks. All others are judged by the memory they go to, whatever its name: writes to
quantized memory are refused, and any other memory of the model is first kept for undoing.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sglang_overlay.core.capture import WriteSink, storage_key
from sglang_overlay.core.partial_capture import PartialCapture
from sglang_overlay.core.sources import oddity
from sglang_overlay.errors import WeightUpdateError
from sglang_overlay.load.stored_dtypes import QUANTIZED
from sglang_overlay.update.undo import UndoLog

aten = torch.ops.aten


class GivenTensors:
    """The tensors that upstream was given in one call, and which of them it used.

    Any thread may ``note``, but only one may ``offer``. Several tensors may share a storage (flattened buckets).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: dict[int, list[tuple[int, int, str]]] = {}
        # A weak reference keeps a storage's key from being reused for other memory.
        self._alive: dict[int, StorageWeakRef] = {}
        self._used: set[str] = set()
        self.names: dict[str, None] = {}
        self.last: str | None = None
        """Name of the tensor that upstream was given last; None before the first."""

    def offer(self, name: str, tensor: torch.Tensor) -> None:
        """Note that upstream is about to get ``tensor``."""
        self.last = name
        self.names[name] = None
        if oddity(tensor) is not None or not tensor.numel():
            self._used.add(name)
            return
        key = storage_key(tensor)
        start = tensor.storage_offset() * tensor.itemsize
        with self._lock:
            if key not in self._alive:
                self._alive[key] = StorageWeakRef(tensor.untyped_storage())
            bisect.insort(self._spans.setdefault(key, []), (int(start), int(start + tensor.nbytes), name))

    def note(self, values: Iterable[Any]) -> None:
        """Note that upstream uses these arguments of an operation or a loader."""
        for value in values:
            if isinstance(value, torch.Tensor):
                name = self.name_of(value)
                if name is not None:
                    self._used.add(name)
            elif isinstance(value, (list, tuple)):
                self.note(value)

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Name of the given tensor that ``tensor`` is a view of; None if there is none."""
        spans = self._spans.get(storage_key(tensor))
        if spans is None:
            return None
        offset = tensor.storage_offset() * tensor.itemsize
        with self._lock:
            found = bisect.bisect_right(spans, offset, key=lambda span: span[0]) - 1
            start, end, name = spans[max(found, 0)]
        return name if start <= offset < end else None

    @property
    def unused(self) -> list[str]:
        """Names of tensors that upstream has not used, in the order given."""
        return [name for name in self.names if name not in self._used]


class ServedMemory:
    """The memory of a model that loaders may write to directly, by ``storage_key``.

    Args:
        quantized: names of quantized weights and their scales, which only quantizing may write.
        others: names of all other tensors.
        undo: keeps their values before they are overwritten.
    """

    def __init__(self, quantized: Mapping[int, str], others: Mapping[int, str], undo: UndoLog) -> None:
        self._quantized = quantized
        self._others = others
        self._undo = undo

    def before_write(self, destination: torch.Tensor) -> None:
        """Allow a write, after keeping the values for undoing.

        Raises:
            WeightUpdateError: the write goes to quantized memory.
        """
        key = storage_key(destination)
        if key in self._quantized:
            raise WeightUpdateError(
                f"{self._quantized[key]} holds quantized values, and upstream was about to write into them: high "
                "precision would be cast under the old scale"
            )
        if key in self._others:
            self._undo.keep(destination)


class UpdateCapture(PartialCapture):
    """A ``PartialCapture`` that asks ``served`` about all other writes, and refuses to cast fp8 values.

    Args:
        sinks: the sink for each placeholder, by ``storage_key``.
        takes_values: placeholders whose sinks take quantized values, by ``storage_key``, with the served dtype.
        served: the model's other memory.
        given: the tensors that upstream was given in this call.
    """

    def __init__(
        self,
        sinks: Mapping[int, WriteSink],
        takes_values: Mapping[int, torch.dtype],
        served: ServedMemory,
        given: GivenTensors,
    ) -> None:
        super().__init__(sinks)
        self._takes_values = takes_values
        self._served = served
        self._given = given

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._given.note(args)
        # copy_ may also get a plain number.
        if func is aten.copy_.default and isinstance(args[1], torch.Tensor):
            self._refuse_conversion(args[1], args[0].dtype, storage_key(args[0]))
            if not args[1].is_meta and not _is_same_memory(args[0], args[1]):
                self._served.before_write(args[0])
                self._refuse_integers(args[1], args[0])
        elif func is aten._to_copy.default:
            self._refuse_conversion(args[0], (kwargs or {}).get("dtype") or args[0].dtype)
        else:
            for written in _written(func, args, kwargs or {}):
                self._served.before_write(written)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _refuse_conversion(self, source: torch.Tensor, dtype: torch.dtype, key: int | None = None) -> None:
        if source.dtype in QUANTIZED and dtype is not source.dtype and key not in self._takes_values:
            raise WeightUpdateError(
                f"{self._given.name_of(source) or 'a tensor'} holds {dtype_name(source.dtype)} values, and goes where "
                f"{dtype_name(dtype)} is served: without its scale it means nothing. Send it in high precision"
            )

    def _refuse_integers(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        if self._takes_values.get(storage_key(destination)) is source.dtype:
            return
        name = self._given.name_of(source)
        if name is not None and destination.is_floating_point() and not source.is_floating_point():
            raise WeightUpdateError(
                f"{name} holds {dtype_name(source.dtype)} values, and goes where {dtype_name(destination.dtype)} "
                "is served: quantized weights mean nothing without their scales"
            )


def _is_same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a copy would change nothing, as when SGLang's post_load.py moves ``cuda:0`` to ``cuda`` and back."""
    return _place(one) == _place(other)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return storage_key(tensor), tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name, for messages."""
    return str(dtype).removeprefix("torch.")


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operation writes to."""
    positions, names = _changed_arguments(func)
    values = [args[position] for position in positions if position < len(args)]
    values += [kwargs[name] for name in names if name in kwargs]
    tensors: list[Any] = []
    for value in values:
        tensors += value if isinstance(value, (list, tuple)) else [value]
    return [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]


@cache
def _changed_arguments(func: Any) -> tuple[tuple[int, ...], tuple[str, ...]]:
    if not func._schema.is_mutable:
        return (), ()
    changed = [
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tuple(position for position, _ in changed), tuple(name for _, name in changed)
