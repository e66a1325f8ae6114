# SPDX-License-Identifier: Apache-2.0
"""One model load: the owner of every streamed layer from ``create_weights`` to the end of loading."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sglang.srt.layers.quantization.streaming_fp8 import eligibility
from sglang.srt.layers.quantization.streaming_fp8.capture import storage_key
from sglang.srt.layers.quantization.streaming_fp8.errors import (
    LayerNotStreamableError,
    PlaceholderLeakError,
    StagingMemoryError,
    UnexpectedParametersError,
    sentence,
    shortened,
)
from sglang.srt.layers.quantization.streaming_fp8.layer import LayerStream
from sglang.srt.layers.quantization.streaming_fp8.layer_plan import LayerPlan, ParameterPlan
from sglang.srt.layers.quantization.streaming_fp8.placeholders import materialize, set_loader
from sglang.srt.layers.quantization.streaming_fp8.shortage import is_shortage, memory_note, shortage_explained
from sglang.srt.layers.quantization.streaming_fp8.sources import CheckpointSources
from sglang.srt.layers.quantization.streaming_fp8.staging import StagingAccount
from sglang.srt.layers.quantization.streaming_fp8.stream import ParameterStream

if TYPE_CHECKING:
    from sglang.srt.layers.quantization.streaming_fp8.checkpoint_watch import CheckpointWatch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingLayer:
    """A layer whose placeholders exist, before its name in the model is known."""

    plan: LayerPlan
    device: torch.device
    placeholders: dict[str, torch.nn.Parameter]
    storage_keys: dict[str, int]


class ModelLoad:
    """State of one load. Belongs to the loading thread.

    Loader threads reach the streams, which lock themselves, and what is noted of a layer that goes back to stock: one
    entry of a dict at a time, and each layer goes back once.

    Args:
        obstacle: why online fp8 layers cannot be streamed in this load, if so known beforehand.
        excluded: why certain layers, by name, must take stock's path.
        checkpoint: sees what is read; without one, missing weights are warnings, and nothing else is said.

    Attributes:
        final: errors that building the model without placeholders would not mend.
        lost: layers of which values are lost, and why: the model has to be loaded anew, with them excluded.
    """

    final: ClassVar[tuple[type[Exception], ...]] = (StagingMemoryError,)

    def __init__(
        self,
        obstacle: str | None = None,
        excluded: Mapping[str, str] = MappingProxyType({}),
        checkpoint: CheckpointWatch | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.sources = CheckpointSources()
        self.account = StagingAccount()
        self.deferred: dict[str, str] = {}
        self.fallback: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        self.abandoned: str | None = None
        self.units = 0
        self.direct_units = 0
        self.layers = 0
        self._obstacle = obstacle
        self._excluded = excluded
        self._pending: dict[torch.nn.Module, PendingLayer] = {}
        self._unnamed: list[tuple[torch.nn.Module, str]] = []
        self._streams: dict[torch.nn.Module, tuple[LayerStream, LayerPlan]] = {}
        self._finished: dict[torch.nn.Module, LayerPlan] = {}
        # Tensors that the model itself has made without memory.
        self._without_memory: set[str] = set()

    # -- building the model ------------------------------------------------------------

    @staticmethod
    def covers(config: Any) -> bool:
        """Whether this is a quantization config that this kind of load knows how to stream."""
        return eligibility.is_online_fp8(config)

    def admits(self, config: Any) -> bool:
        """Whether layers of this quantization config are to be streamed."""
        if self.abandoned or not self.covers(config):
            return False
        if self._obstacle is not None:
            self.abandon(self._obstacle)
            self.refuse(self._obstacle)
        return not self.abandoned

    def create_weights(
        self, create: Callable[[], None], layer: torch.nn.Module, dtype: torch.dtype, plan: LayerPlan
    ) -> None:
        """Run upstream's ``create_weights`` with the weights of ``plan`` as placeholders."""
        try:
            made = plan.create(create, layer, dtype)
        except UnexpectedParametersError as error:
            self.leave(layer, str(error))
            create()
            return
        keys = {name: storage_key(value) for name, value in made.parameters.items()}
        self._pending[layer] = PendingLayer(plan, made.device, made.parameters, keys)

    def leave(self, layer: torch.nn.Module, reason: str) -> None:
        """Note that a layer takes stock's path."""
        self._unnamed.append((layer, reason))

    def adopt(self, model: torch.nn.Module) -> str | None:
        """Start streaming the layers of a model that has just been built.

        Returns:
            Why the model cannot be streamed at all, or None.
        """
        names = {module: name for name, module in model.named_modules()}
        for layer, pending in self._pending.items():
            changed = _changed(layer, pending)
            if changed is not None:
                return f"{names.get(layer, type(layer).__name__)}.{changed} is repacked while the model is built"
        placeholders = {key for pending in self._pending.values() for key in pending.storage_keys.values()}
        self._without_memory.update(
            name for name, tensor in tensors_of(model) if tensor.is_meta and storage_key(tensor) not in placeholders
        )
        for layer, reason in self._unnamed:
            self._fall_back(names.get(layer, type(layer).__name__), reason)
        for layer, pending in self._pending.items():
            self._start(layer, names.get(layer), pending)
        self._pending.clear()
        self._unnamed.clear()
        self._build_kernels()
        return None

    def abandon(self, reason: str) -> None:
        """Load the whole model as stock does, and let go of what is held for the one that was built."""
        self.abandoned = reason
        self._pending.clear()
        self._unnamed.clear()
        self._release()
        self._streams.clear()
        self.deferred.clear()
        self.fallback.clear()

    def refuse(self, reason: str) -> None:
        """Say that the model is loaded as stock does."""
        logger.warning("StreamFP8: %s The model is loaded without streaming.", sentence(reason))

    @property
    def building(self) -> bool:
        """Whether any placeholder has been made."""
        return bool(self._pending)

    # -- after the weights are read ----------------------------------------------------

    def finish(self, layer: torch.nn.Module) -> LayerPlan | None:
        """Replace a layer's placeholders by its quantized parameters.

        Returns:
            The plan of a layer that was quantized here, now or by an earlier call; None where upstream has to do it.
        """
        stream, plan = self._streams.get(layer, (None, None))
        if layer not in self._finished and plan is not None and stream is not None and stream.streaming:
            try:
                self._settle(stream)
            except LayerNotStreamableError as error:
                stream.drop_staged()
                self._lose(stream, error.reason)
            plan.register(layer, {name: part.storage for name, part in stream.streams.items()})
            stream.finish()
            self._finished[layer] = plan
            self.layers += 1
        return self._finished.get(layer)

    def check(self, model: torch.nn.Module, model_config: Any) -> None:
        """Make sure that everything was written, and that nothing still refers to a placeholder.

        Raises:
            StreamFP8Error: as of ``CheckpointWatch.conclude``.
            PlaceholderLeakError: the model holds a tensor that was computed from one, and has no memory.
        """
        if self.checkpoint is not None:
            self.checkpoint.conclude(model, model_config)
        leaks = [name for name, tensor in tensors_of(model) if tensor.is_meta and name not in self._without_memory]
        if leaks and self._streams:
            raise PlaceholderLeakError(
                f"computed from a weight that was being streamed, these tensors hold no data: {shortened(leaks)}"
            )

    def reading(self) -> AbstractContextManager[None]:
        """Around all of upstream's load."""
        return nullcontext() if self.checkpoint is None else self.checkpoint.reading()

    def see(self, name: str, tensor: object) -> None:
        """Note an entry of the checkpoint, before the model gets it."""
        if self.checkpoint is not None:
            self.checkpoint.see(name, tensor)
        self.sources.offer(tensor, name)

    def explain(self, error: Exception) -> Iterator[str]:
        """What an error that ended upstream's load does not say itself."""
        if is_shortage(error):
            yield memory_note(self.account)
        if self.checkpoint is not None:
            yield from self.checkpoint.explain([stream for stream, _ in self._streams.values()])

    def close(self) -> None:
        """Release all staging memory. To be called once, also when loading failed."""
        self._release()

    # -- helpers -----------------------------------------------------------------------

    def _release(self) -> None:
        for stream, _ in self._streams.values():
            stream.drop_staged()

    def _start(self, layer: torch.nn.Module, name: str | None, pending: PendingLayer) -> None:
        if name is None:
            # Not part of the module tree, so stock would never quantize it either.
            _allocate_as_stock(pending)
            return
        reason = eligibility.why_deferred(name)
        if reason is not None:
            _allocate_as_stock(pending)
            self.deferred[name] = reason
        elif name in self._excluded:
            _allocate_as_stock(pending)
            self._fall_back(name, self._excluded[name])
        else:
            self._open(layer, name, pending)

    def _open(self, layer: torch.nn.Module, name: str, pending: PendingLayer) -> None:
        """Stream a layer's parameters from now on."""
        streams = {}
        for key, placeholder in pending.placeholders.items():
            size = placeholder.numel() * torch.float8_e4m3fn.itemsize
            with shortage_explained(f"for the fp8 storage of {name}.{key}", size, self.account):
                storage = pending.plan.allocate(key, placeholder, pending.device)
            plan = pending.plan.parameter(key, placeholder, storage)
            streams[key] = (placeholder, self._stream(f"{name}.{key}", placeholder, plan))
        layer_stream = LayerStream(name, streams, functools.partial(self._return, layer), self._lose, _shared_by())
        for placeholder in pending.placeholders.values():
            set_loader(placeholder, layer_stream.wrap(placeholder.weight_loader))
        self._streams[layer] = (layer_stream, pending.plan)

    def _build_kernels(self) -> None:
        """Use each kernel once, before threads of a model's loader do: what is built then is built by one of them."""
        kinds = {part.kind: part for stream, _ in self._streams.values() for part in stream.streams.values()}
        for part in kinds.values():
            part.warm_up()

    def _stream(self, name: str, placeholder: torch.nn.Parameter, plan: ParameterPlan) -> ParameterStream:
        return ParameterStream(
            name,
            placeholder,
            plan.grid,
            plan.quantizer,
            plan.storage,
            self.account,
            self.sources,
        )

    def _return(self, layer: torch.nn.Module, stream: LayerStream, reason: str) -> None:
        """A layer has gone back to stock."""
        self._fall_back(stream.name, reason)

    def _lose(self, stream: LayerStream, reason: str) -> None:
        """It has turned out too late that a layer cannot be streamed."""
        self.lost[stream.name] = reason

    def _fall_back(self, name: str, reason: str) -> None:
        self.fallback[name] = reason
        logger.warning("StreamFP8: %s is loaded as in stock SGLang: %s", name, sentence(reason))

    def _settle(self, stream: LayerStream) -> None:
        if self.checkpoint is not None:
            self.checkpoint.note_misfits(stream)
        for part in stream.streams.values():
            missing = part.settle_with_zeros()
            self.units += part.units - len(missing)
            self.direct_units += part.direct_units
            self._note(stream.name, part, missing)

    def _note(self, layer: str, part: ParameterStream, missing: Sequence[int]) -> None:
        """A parameter is finished; ``missing`` are units that were never completely written, and hold zeros."""
        if self.checkpoint is not None:
            self.checkpoint.note(layer, part, missing)
        elif missing:
            logger.warning("StreamFP8: %s: %d of %d units were not loaded.", part.name, len(missing), part.units)


def _shared_by() -> int:
    """How many may share a parameter."""
    from sglang.srt.distributed import parallel_state

    try:
        size: int = parallel_state.get_tp_group().world_size
    except AssertionError:  # No group, as where a model is only described.
        return 1
    return size


def _allocate_as_stock(pending: PendingLayer) -> None:
    for placeholder in pending.placeholders.values():
        materialize(placeholder, torch.empty_like(placeholder, device=pending.device))


_current: ContextVar[ModelLoad | None] = ContextVar("streamfp8_load", default=None)


def current() -> ModelLoad | None:
    """The load that is under way in this thread and may stream, or None."""
    return _current.get()


def create_streamed(
    original: Callable[..., None],
    plan: Callable[[], LayerPlan],
    method: Any,
    layer: torch.nn.Module,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Around ``create_weights`` of a quantization method: with placeholders where the layer can be streamed."""
    load = current()
    create = functools.partial(original, method, layer, *args, **kwargs)
    if load is None or not load.admits(method.quant_config):
        create()
        return
    reason = eligibility.why_not_layer(method, layer)
    if reason is not None:
        load.leave(layer, reason)
        create()
        return
    dtype = inspect.signature(original).bind(method, layer, *args, **kwargs).arguments["params_dtype"]
    load.create_weights(create, layer, dtype, plan())


def process_streamed(original: Callable[..., None], method: Any, layer: torch.nn.Module) -> None:
    """Around ``process_weights_after_loading`` of a quantization method: what is left to do after quantizing."""
    load = current()
    plan = None if load is None else load.finish(layer)
    process = functools.partial(original, method, layer)
    if plan is None:
        process()
    else:
        plan.process(process, method, layer)


@contextmanager
def under_way(load: ModelLoad) -> Iterator[None]:
    """Make ``load`` the current one."""
    token = _current.set(load)
    try:
        yield
    finally:
        _current.reset(token)


def tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, buffer and tensor in an attribute (MLA's ``w_kc``) of a model, with its name."""
    for prefix, module in model.named_modules():
        attributes = {name: value for name, value in vars(module).items() if name not in TORCH_ATTRIBUTES}
        for values in (module._parameters, module._buffers, attributes):
            for name, value in values.items():
                yield from _tensors_in(value, f"{prefix}.{name}" if prefix else name, MOST_NESTED)


TORCH_ATTRIBUTES = frozenset({"_parameters", "_buffers", "_modules"})
"""Where torch keeps what a module holds; all other attributes are the model's own."""
MOST_NESTED = 3
"""Lists and dicts within each other in which tensors are looked for."""


def _tensors_in(value: Any, name: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple, dict)) and depth:
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, item in items:
            yield from _tensors_in(item, f"{name}[{key!r}]", depth - 1)


def _changed(layer: torch.nn.Module, pending: PendingLayer) -> str | None:
    for name, placeholder in pending.placeholders.items():
        if layer._parameters.get(name) is not placeholder or storage_key(placeholder) != pending.storage_keys[name]:
            return name
    return None
