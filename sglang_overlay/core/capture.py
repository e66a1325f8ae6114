# SPDX-License-Identifier: Apache-2.0
"""Capture what a weight loader writes into a placeholder.

A placeholder is a parameter on the meta device: it has the shape the loader expects and no memory. While the loader
runs unchanged, ``WriteCapture`` sees each operation it dispatches; a write whose destination shares a placeholder's
storage is handed to that placeholder's sink instead of being executed.

Related: PyTorch's ``TorchDispatchMode``; SGLang's ``CopyNumelCounter`` (``online_quantization.py``, PR #18005) counts
the elements of ``copy_`` in the same way, but looks neither at where they go nor at their values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_overlay.core.errors import UnsupportedWriteError

aten = torch.ops.aten


class WriteSink(Protocol):
    """Takes the writes to one placeholder."""

    name: str

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Take ``source``, written to ``destination``, a view of the placeholder. Their shapes are equal."""


def storage_key(tensor: torch.Tensor) -> int:
    """Identifies a placeholder's storage; valid while the placeholder lives."""
    key: int = tensor.untyped_storage()._cdata
    return key


class WriteCapture(TorchDispatchMode):
    """Hands writes to placeholders to their sinks. Active in one thread only, as every dispatch mode is.

    Args:
        sinks: the sink for each placeholder, by ``storage_key``.

    Raises:
        UnsupportedWriteError: from the loader's own line, if it changes a placeholder by anything but a plain write or
            needs a placeholder's contents.
    """

    def __init__(self, sinks: Mapping[int, WriteSink]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sinks = sinks

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SOURCES:
            sink = self._sink(args[0])
            if sink is not None:
                sink.write(args[0], _SOURCES[func](args))
                return args[0]
        elif _is_mutable(func):
            self._refuse_change(func, args, kwargs)
        elif func is aten.scalar_tensor.default and _is_meta(kwargs.get("device")):
            # ``parameter[...] = 1.0`` makes its scalar on the destination's device, where the value would be lost.
            kwargs = {**kwargs, "device": torch.device("cpu")}
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            self._explain(func, args, kwargs, error)
            raise

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Loaders are never compiled, and torch's guard against that would cost more than everything else here.
        return False

    def _sink(self, tensor: torch.Tensor) -> WriteSink | None:
        return self._sinks.get(storage_key(tensor)) if tensor.is_meta else None

    def _refuse_change(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for tensor in _tensors(args, kwargs):
            sink = self._sink(tensor)
            if sink is not None:
                raise UnsupportedWriteError(f"{sink.name} is changed by {func}, which is no plain write")

    def _explain(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> None:
        if any(tensor.is_meta for tensor in _tensors(args, kwargs)):
            raise UnsupportedWriteError(f"{func} needs the contents of a parameter that is being streamed") from error


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """An operation's tensors, with those in lists, as ``cat`` and ``_foreach_copy_`` take them."""
    for value in (*args, *kwargs.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor):
                yield item


@cache
def _is_mutable(func: Any) -> bool:
    mutable: bool = func._schema.is_mutable
    return mutable


def copied(destination: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """What ``copy_`` writes: ``source``, expanded to the shape of ``destination``.

    Raises:
        UnsupportedWriteError: ``source`` has no data.
    """
    if source.is_meta and source.numel():
        raise UnsupportedWriteError(f"a tensor of shape {tuple(source.shape)} without data is written")
    expanded: torch.Tensor = source if source.shape == destination.shape else source.expand(destination.shape)
    return expanded


def _filled(args: tuple[Any, ...]) -> torch.Tensor:
    destination, value = args[0], args[1]
    if isinstance(value, torch.Tensor):
        return copied(destination, value)
    return torch.tensor(value, dtype=destination.dtype, device="cpu").expand(destination.shape)


def _zeroed(args: tuple[Any, ...]) -> torch.Tensor:
    return torch.zeros((), dtype=args[0].dtype, device="cpu").expand(args[0].shape)


_SOURCES = {
    aten.copy_.default: lambda args: copied(args[0], args[1]),
    aten.fill_.Scalar: _filled,
    aten.fill_.Tensor: _filled,
    aten.zero_.default: _zeroed,
}


def _is_meta(device: Any) -> bool:
    return device is not None and torch.device(device).type == "meta"
