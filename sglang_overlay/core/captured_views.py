# SPDX-License-Identifier: Apache-2.0
"""Capture a loader's writes through a tensor subclass, which sees operations on the placeholder only.

``WriteCapture`` costs several microseconds for every operation of a loader, most of which do not touch the placeholder:
seven per call of an experts' loader, which a model calls tens of thousands of times. Here the placeholder and its views
belong to a tensor subclass, which implements what experts' loaders do with them (``data``, an index, ``narrow``,
``copy_``). Any other operation runs inside a ``WriteCapture``, so both ways accept and refuse the same writes in the
same order. Writes through views taken before the loader was called reach the sinks by ``bypass_capture.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from sglang_overlay.core.capture import WriteCapture, WriteSink, copied, storage_key


class ViewCapture(AbstractContextManager[None]):
    """Hands writes to placeholders to their sinks, in threads that are inside it; other threads are unaffected.

    Args:
        sinks: the sink for each placeholder, by ``storage_key``.
    """

    def __init__(self, sinks: Mapping[int, WriteSink]) -> None:
        self._sinks = sinks
        self._thread = threading.local()

    @property
    def is_active(self) -> bool:
        """Whether to capture this thread's writes."""
        return getattr(self._thread, "is_active", False)

    def __enter__(self) -> None:
        self._thread.is_active = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.is_active = False

    def watch(self, placeholder: torch.nn.Parameter) -> None:
        """Capture operations on a placeholder, and on views of it, from now on. It must be a plain ``Parameter``."""
        view = self.view(placeholder.data, self._sinks[storage_key(placeholder)])
        placeholder.__class__ = _WatchedParameter
        placeholder._streamfp8_view = view  # type: ignore[attr-defined]

    @staticmethod
    def unwatch(placeholder: torch.nn.Parameter) -> None:
        """Stop watching: make the placeholder a plain ``Parameter`` again."""
        if type(placeholder) is _WatchedParameter:
            del placeholder._streamfp8_view
            placeholder.__class__ = torch.nn.Parameter  # type: ignore[assignment]

    def view(self, plain: torch.Tensor, sink: WriteSink | None) -> _View:
        """``plain`` as a ``_View``: a view of the placeholder of ``sink`` or, without a sink, computed from one."""
        view = plain.as_subclass(_View)
        view._plain, view._sink, view._capture = plain, sink, self
        return view

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run any operation on watched tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            if not self.is_active:
                return func(*args, **kwargs)
            with WriteCapture(self._sinks):
                result = func(*args, **kwargs)
            return tree_map(self._watched, result)

    def _watched(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or not value.is_meta:
            return value
        # Tensors computed from a placeholder have no data either: refuse operations that need some.
        return self.view(value, self._sinks.get(storage_key(value)))


def capture_of(
    placeholders: Iterable[torch.nn.Parameter], sinks: Mapping[int, WriteSink]
) -> Callable[[], AbstractContextManager[Any]]:
    """A function that returns the context that captures a loader's writes to ``placeholders``.

    Only plain parameters can be watched: upstream's loaders check the class of upstream's own parameters.
    """
    found = list(placeholders)
    if any(type(placeholder) is not torch.nn.Parameter for placeholder in found):
        return lambda: WriteCapture(sinks)
    capture = ViewCapture(sinks)
    for placeholder in found:
        capture.watch(placeholder)
    return lambda: capture


_PLAIN_CLASSES = (torch.Tensor, torch.nn.Parameter)


def _run(_cls: type, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
    """An operation on watched tensors, as ``__torch_function__`` gets it."""
    return _capture_among(args, kwargs or {}).run(func, args, kwargs or {})


class _View(torch.Tensor):
    """A view of a placeholder or, without a sink, computed from one. ``_plain`` is the same as an ordinary tensor."""

    _plain: torch.Tensor
    _sink: WriteSink | None
    _capture: ViewCapture

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self._plain.shape

    def dim(self) -> int:
        return self._plain.dim()

    def __getitem__(self, index: Any) -> torch.Tensor:
        if type(index) is int:
            return self._capture.view(self._plain[index], self._sink)
        return super().__getitem__(index)

    def narrow(self, dim: int, start: Any, length: Any) -> torch.Tensor:
        return self._capture.view(self._plain.narrow(dim, start, length), self._sink)

    def copy_(self, source: Any, non_blocking: bool = False) -> torch.Tensor:  # noqa: FBT001
        sink = self._sink
        if sink is not None and type(source) in _PLAIN_CLASSES and self._capture.is_active:
            sink.write(self._plain, copied(self._plain, source))
            return self
        return super().copy_(source, non_blocking)

    __torch_function__: Any = classmethod(_run)


class _WatchedParameter(torch.nn.Parameter):
    """A watched placeholder. ``_streamfp8_view`` is a view of all of it."""

    _streamfp8_view: _View

    @property
    def data(self) -> torch.Tensor:
        view = self._streamfp8_view
        return view if view._capture.is_active else view._plain.data

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]

    __torch_function__: Any = classmethod(_run)


def _capture_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> ViewCapture:
    """The capture of the first watched tensor among arguments; it is a layer's, and loaders work on one layer."""
    # Nearly always an argument of its own; looking into lists takes as long as all else done here.
    found = _first_capture(args) or _first_capture(tree_leaves((args, kwargs)))
    if found is None:
        raise TypeError("an operation on a watched tensor that is not among its arguments")
    return found


def _first_capture(values: Iterable[Any]) -> ViewCapture | None:
    for value in values:
        if isinstance(value, _View):
            return value._capture
        if isinstance(value, _WatchedParameter):
            return value._streamfp8_view._capture
    return None
