# SPDX-License-Identifier: Apache-2.0
"""One streamed layer: its placeholders, its wrapped loaders, and the fallback to stock."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch

from sglang_overlay.core.capture import WriteCapture, storage_key
from sglang_overlay.core.captured_views import ViewCapture, capture_of
from sglang_overlay.core.checkpoint_stream import CheckpointStream
from sglang_overlay.core.errors import LayerNotStreamableError, UnsupportedWriteError
from sglang_overlay.core.loader_calls import LoaderCalls, Misfit, WatchedSink
from sglang_overlay.core.messages import annotate
from sglang_overlay.core.placeholders import materialize

WeightLoader = Callable[..., Any]


class LayerStream:
    """The parameters of one layer that are being streamed.

    Any thread may call a wrapped loader. ``_lock`` guards ``_loading`` (threads inside upstream's loader) and
    ``_returning`` (a fallback is in progress): a layer falls back to stock only while no thread is inside a loader.
    ``streaming`` changes only then; threads read it after waiting for a fallback to end, or when no loader runs.

    Args:
        name: the layer's qualified name, for messages.
        streams: each placeholder and its stream, by parameter name.
        on_return: called once, with the layer and the reason, when the layer has fallen back to stock.
        on_loss: called once instead if values had been quantized and are lost: the model has to be loaded again.
            Loading goes on, so that one more load is enough for all such layers.
        ranks: the most ranks that share a parameter.
    """

    def __init__(
        self,
        name: str,
        streams: Mapping[str, tuple[torch.nn.Parameter, CheckpointStream]],
        on_return: Callable[[LayerStream, str], None],
        on_loss: Callable[[LayerStream, str], None],
        ranks: int = 1,
    ) -> None:
        self.name = name
        self.streaming = True
        self.placeholders = {key: placeholder for key, (placeholder, _) in streams.items()}
        self.streams = {key: stream for key, (_, stream) in streams.items()}
        self._calls = LoaderCalls(ranks, self._name_of)
        self._sinks = {
            storage_key(placeholder): WatchedSink(stream, placeholder.shape, self._calls.under_way)
            for placeholder, stream in streams.values()
        }
        self._capture = capture_of(self.placeholders.values(), self._sinks)
        self._on_return = on_return
        self._on_loss = on_loss
        # Entered directly: entering the condition runs Python code.
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._loading = 0
        self._returning = False
        self._thread = threading.local()

    def wrap(self, loader: WeightLoader) -> WeightLoader:
        """Upstream's loader, with its writes to this layer's placeholders captured.

        If the loader does something that cannot be captured, the layer falls back to stock and the loader runs again
        on the real parameter.
        """

        @functools.wraps(loader)
        def load(*args: Any, **kwargs: Any) -> Any:
            # A model may have put its own loader around an already wrapped one.
            if self.is_inside or not self._enter():
                return loader(*args, **kwargs)
            try:
                with self._captured(args, kwargs):
                    return loader(*args, **kwargs)
            except UnsupportedWriteError as error:
                reason = str(error)
            finally:
                self._leave()
            self.return_to_stock(reason)
            return loader(*args, **kwargs)

        return load

    def return_to_stock(self, reason: str) -> None:
        """Fall back to stock: give every placeholder, in place, real memory with everything written so far.

        Raises:
            LayerNotStreamableError: that is impossible; the model has to be loaded anew.
        """
        with self._condition:
            self._condition.wait_for(lambda: not self._returning)
            if not self.streaming:
                return
            self._returning = True
            self._condition.wait_for(lambda: self._loading == 0)
        try:
            lost = ""
            self._uncapture()
            for key, stream in self.streams.items():
                try:
                    values = stream.restore()
                except LayerNotStreamableError as error:
                    lost = error.reason
                    values = stream.abandon()
                try:
                    materialize(self.placeholders[key], values)
                except RuntimeError as error:  # A model has weak references to it, which swap_tensors refuses.
                    raise LayerNotStreamableError(stream.name, f"{reason}, and {error}") from error
            self.streaming = False
            if lost:
                self._on_loss(self, f"{reason}, and {lost}")
            else:
                self._on_return(self, reason)
            # Parameters refer to this, through their loaders, for as long as they live.
            self.placeholders.clear()
            self.streams.clear()
        finally:
            with self._condition:
                self._returning = False
                self._condition.notify_all()

    def finish(self) -> None:
        """Drop the placeholders and their streams: the layer has its quantized parameters."""
        self._uncapture()
        self.placeholders.clear()
        self.streams.clear()

    @property
    def misfits(self) -> list[Misfit]:
        """Checkpoint tensors that do not fill their part of a parameter."""
        return self._calls.misfits

    @property
    def is_inside(self) -> bool:
        """Whether this thread is inside a wrapped loader, or ``take``."""
        return getattr(self._thread, "inside", False)

    def take(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take an operation that changes a placeholder, and comes from no wrapped loader.

        Returns:
            Whether it is done; otherwise the parameter has real memory now, and the operation has to be executed there.

        Raises:
            UnsupportedWriteError: it cannot be taken, and this thread is inside a wrapped loader, which sees to it.
        """
        if self.is_inside:
            # Through a view that was taken before the loader was called.
            with WriteCapture(self._sinks):
                func(*args, **kwargs)
            return True
        if not self._enter():
            return False
        try:
            with WriteCapture(self._sinks):
                func(*args, **kwargs)
            return True
        except UnsupportedWriteError as error:
            reason = f"{error}, outside of its weight loader"
        finally:
            self._leave()
        self.return_to_stock(reason)
        return False

    def _captured(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AbstractContextManager[None]:
        """Context for a loader that is called with these arguments."""
        given = [*args[1:], *kwargs.values()]
        return _Call(self, [*args[:1], *given], self._calls.of(given), self._capture())

    def _uncapture(self) -> None:
        """Nothing is a placeholder any more. Parameters refer to this layer as long as they live."""
        for placeholder in self.placeholders.values():
            ViewCapture.unwatch(placeholder)
        self._sinks.clear()

    def _name_of(self, tensor: torch.Tensor) -> str:
        return next((stream.sources.name_of(tensor) for stream in self.streams.values()), "")

    def describe_call(self, arguments: Sequence[Any]) -> str:
        """Say what was being loaded, and into what: upstream's loaders assert shapes without a message."""
        tensors = [value for value in arguments if isinstance(value, torch.Tensor)]
        keys = [key for key, placeholder in self.placeholders.items() if any(placeholder is value for value in tensors)]
        into = f"{self.name}.{keys[0]} {_shape(self.placeholders[keys[0]])}" if keys else self.name
        loaded = [
            f"{self._name_of(value) or 'a tensor'} {_shape(value)}"
            for value in tensors
            if not any(value is placeholder for placeholder in self.placeholders.values())
        ]
        return f"StreamFP8: raised while loading {', '.join(loaded) or 'nothing'} into {into}"

    def drop_staged(self) -> None:
        """Release all staging memory. To be called when no loader runs any more."""
        for stream in self.streams.values():
            stream.drop_staged()

    def _enter(self) -> bool:
        with self._lock:
            while self._returning:
                self._condition.wait()
            self._loading += self.streaming
            self._thread.inside = self.streaming
            return self.streaming

    def _leave(self) -> None:
        with self._lock:
            self._thread.inside = False
            self._loading -= 1
            if self._returning:
                self._condition.notify_all()


class _Call(AbstractContextManager[None]):
    """A call of a loader. A class, since a generator would take longer than placing a small tensor."""

    __slots__ = ("_arguments", "_call", "_layer", "_writes")

    def __init__(
        self,
        layer: LayerStream,
        arguments: Sequence[Any],
        call: AbstractContextManager[Any],
        writes: AbstractContextManager[Any],
    ) -> None:
        self._layer = layer
        self._arguments = arguments
        self._call = call
        self._writes = writes

    def __enter__(self) -> None:
        self._call.__enter__()
        self._writes.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._writes.__exit__(kind, error, traceback)
        self._call.__exit__(kind, error, traceback)
        if isinstance(error, Exception) and not isinstance(error, UnsupportedWriteError):
            annotate(error, self._layer.describe_call(self._arguments))


def _shape(tensor: torch.Tensor) -> str:
    return f"({str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)})"
