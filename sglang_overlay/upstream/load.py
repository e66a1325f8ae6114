# SPDX-License-Identifier: Apache-2.0
"""One model load: the owner of every streamed layer from ``create_weights`` to the end of loading."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from sglang_overlay.core import cpu_kernels
from sglang_overlay.core.capture import storage_key
from sglang_overlay.core.huge_pages import HugePages, free_huge_pages
from sglang_overlay.core.layer import LayerStream
from sglang_overlay.core.pipeline import Pipeline
from sglang_overlay.core.placeholders import PlaceholderAllocation, materialize
from sglang_overlay.core.quantizers import UnitQuantizer
from sglang_overlay.core.shortage import shortage_explained
from sglang_overlay.core.sources import CheckpointSources
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.core.stream import ParameterStream, Storage
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.errors import PlaceholderLeakError
from sglang_overlay.observe.progress import Progress, SilentProgress
from sglang_overlay.settings import Mode, Settings
from sglang_overlay.upstream import eligibility, snapshots
from sglang_overlay.upstream.findings import Findings, shortened
from sglang_overlay.upstream.guard import refuse
from sglang_overlay.upstream.unstreamed import KeptWeight, UnstreamedParameters
from sglang_overlay.upstream.update import UpdatableLayer, set_loader

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter is quantized and where the result goes."""

    grid: UnitGrid
    quantizer: UnitQuantizer
    storage: Storage


class LayerPlan(Protocol):
    """What a kind of layer (linear, experts) knows about being streamed."""

    weights: frozenset[str]
    """Names of the parameters that upstream creates in high precision and quantizes."""

    def allocate(self, placeholder: torch.Tensor, device: torch.device) -> Storage:
        """Final storage of one of ``weights``."""

    def parameter(self, placeholder: torch.Tensor, storage: Storage) -> ParameterPlan:
        """Plan one of ``weights``."""

    def register(self, layer: torch.nn.Module, storages: dict[str, Storage]) -> None:
        """Put the fp8 parameters on the layer as stock's quantization would leave them."""

    def registered(
        self, layer: torch.nn.Module, placeholders: Mapping[str, torch.nn.Parameter]
    ) -> dict[str, Storage] | None:
        """The memory of a layer's fp8 parameters, by name of the weight; None where they have been repacked since."""


@dataclass(frozen=True)
class PendingLayer:
    """A layer whose placeholders exist, before its name in the model is known."""

    plan: LayerPlan
    device: torch.device
    placeholders: dict[str, torch.nn.Parameter]
    storage_keys: dict[str, int]


class ModelLoad:
    """State of one load. Belongs to the loading thread; loader threads reach only the streams, which lock themselves.

    Args:
        mode: what the user asked for.
        device: where the model goes.
        obstacle: why online fp8 layers cannot be streamed in this load, if so known beforehand.
        excluded: why certain layers, by name, must take stock's path.
    """

    def __init__(
        self,
        mode: Mode,
        device: torch.device,
        obstacle: str | None = None,
        excluded: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.mode = mode
        self.sources = CheckpointSources()
        self._device = device
        self._pipeline: Pipeline | None = None
        # Half: reading the files needs free memory as well.
        self._huge_pages = HugePages(free_huge_pages() // 2)
        self.account = StagingAccount()
        self.deferred: dict[str, str] = {}
        self.fallback: dict[str, str] = {}
        self.abandoned = "switched off" if mode is Mode.OFF else None
        self.progress: Progress = SilentProgress()
        self.units = 0
        self.direct_units = 0
        self.layers = 0
        self.updatable: dict[str, UpdatableLayer] = {}
        self.prequantized = False
        self._obstacle = obstacle
        self._excluded = excluded
        self._pending: dict[torch.nn.Module, PendingLayer] = {}
        self._unnamed: list[tuple[torch.nn.Module, str]] = []
        self._streams: dict[torch.nn.Module, tuple[LayerStream, LayerPlan]] = {}
        self._kept: dict[torch.nn.Module, list[KeptWeight]] = {}
        self._unstreamed: UnstreamedParameters | None = None
        self._findings = Findings()
        self._seen: set[str] = set()

    # -- building the model ------------------------------------------------------------------------------------------

    def admits(self, config: Any) -> bool:
        """Whether layers of this quantization config are to be streamed.

        Raises:
            StreamingUnavailableError: streaming is required, and something stands against it.
        """
        if self.abandoned or not eligibility.is_online_fp8(config):
            return False
        if self._obstacle is not None:
            self.abandon(self._obstacle)
            refuse(self.mode, self._obstacle)
        return not self.abandoned

    def create_weights(
        self, create: Callable[[], None], layer: torch.nn.Module, dtype: torch.dtype, plan: LayerPlan
    ) -> None:
        """Run upstream's ``create_weights`` with the weights of ``plan`` as placeholders."""
        allocation = PlaceholderAllocation(dtype)
        with allocation:
            create()
        made = {name: value for name, value in layer._parameters.items() if value is not None and value.is_meta}
        if set(made) != plan.weights or allocation.device is None:
            self.leave(layer, f"upstream created {sorted(made)} where {sorted(plan.weights)} were expected")
            create()
            return
        keys = {name: storage_key(value) for name, value in made.items()}
        self._pending[layer] = PendingLayer(plan, allocation.device, made, keys)

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
        for layer, reason in self._unnamed:
            self._fall_back(names.get(layer, type(layer).__name__), reason)
        if self._device.type == "cpu":
            cpu_kernels.prepare()
        # A device works beside the loader by itself; on the CPU the loader's own thread is one of those that compute.
        self._pipeline = Pipeline(torch.get_num_threads() - 1 if self._device.type == "cpu" else 0)
        for layer, pending in self._pending.items():
            self._start(layer, names.get(layer), pending, self._pipeline)
        self._pending.clear()
        self._unnamed.clear()
        if self._streams and not self.prequantized:
            kept = (weight.weight for weights in self._kept.values() for weight in weights)
            self._unstreamed = UnstreamedParameters(model, kept)
        return None

    def abandon(self, reason: str) -> None:
        """Load the whole model as stock does."""
        self.abandoned = reason
        self._pending.clear()
        self._unnamed.clear()

    def see(self, name: str, tensor: torch.Tensor) -> None:
        """Note a tensor of the checkpoint, before the model gets it."""
        self._seen.add(name)
        self.sources.offer(tensor, name)

    @property
    def warnings(self) -> list[str]:
        """What was found wrong with the checkpoint, and is served all the same."""
        return self._findings.warnings

    def expect_quantized(self) -> None:
        """What is read is fp8 already: upstream quantizes the empty parameters first and fills the result."""
        self.prequantized = True

    def placeholders(self) -> Iterator[tuple[str, torch.nn.Parameter, ParameterStream]]:
        """Every placeholder that waits to be written: its name, itself, and what takes the writes."""
        for layer, _ in self._streams.values():
            for key, stream in layer.streams.items():
                yield f"{layer.name}.{key}", layer.placeholders[key], stream

    @property
    def building(self) -> bool:
        """Whether any placeholder has been made."""
        return bool(self._pending)

    @property
    def streamed_bytes(self) -> int:
        """Size of all fp8 weights to be filled."""
        streams = (stream for layer, _ in self._streams.values() for stream in layer.streams.values())
        return sum(stream.storage.weight.nbytes for stream in streams)

    # -- after the weights are read ----------------------------------------------------------------------------------

    def finish(self, layer: torch.nn.Module) -> bool:
        """Replace a layer's placeholders by its fp8 parameters.

        Returns:
            Whether the layer was streamed, now or by an earlier call; if not, upstream has to quantize it.
        """
        if self._unstreamed is not None:
            # Before upstream's post-processing, which may compute with them.
            self._unstreamed.settle()
        for weight in self._kept.pop(layer, ()):
            self._findings.note(weight.name.rpartition(".")[0], weight, weight.missing())
            weight.let_go()
        if layer not in self._streams:
            return False
        stream, plan = self._streams[layer]
        if stream.streaming and stream.streams:
            self._settle(stream)
            plan.register(layer, {name: part.storage for name, part in stream.streams.items()})
            stream.streams.clear()
            stream.placeholders.clear()
            self.layers += 1
        return stream.streaming

    def check(self, model: torch.nn.Module, settings: Settings, model_config: Any) -> None:
        """Make sure that everything was written from the checkpoint and nothing still refers to a placeholder.

        Raises:
            IncompleteLoadError: units were never completely written.
            NonFiniteWeightError: a weight is not finite, where streaming is required.
            PlaceholderLeakError: the model holds a tensor without memory.
            LayerNotStreamableError: a layer has to be loaded anew.
        """
        if self._pipeline is not None:
            # First: a unit whose job failed is incomplete too.
            self._pipeline.close()
            self._pipeline.check()
        if self._unstreamed is not None:
            self._unstreamed.settle()
            self._findings.note_unstreamed(self._unstreamed.missing(model_config), self._unstreamed.not_finite())
        self._findings.conclude(settings, self._seen, Path(model_config.model_path))
        snapshots.refresh(model)
        leaks = [name for name, tensor in tensors_of(model) if tensor.is_meta]
        if leaks and not self.abandoned:
            raise PlaceholderLeakError(
                f"computed from a weight that was being streamed, these tensors hold no data: {shortened(leaks)}"
            )

    def close(self) -> None:
        """End what runs beside the load. To be called once, also when loading failed."""
        self.progress.close()
        if self._pipeline is not None:
            self._pipeline.close()
        for stream, _ in self._streams.values():
            stream.release()

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _start(self, layer: torch.nn.Module, name: str | None, pending: PendingLayer, pipeline: Pipeline) -> None:
        if name is None:
            # Not part of the module tree, so stock would never quantize it either.
            self._materialize(pending)
            return
        updatable = self.updatable[name] = UpdatableLayer(name, layer, pending.plan, pending.placeholders)
        reason = eligibility.why_deferred(name)
        if reason is not None:
            updatable.let_go()
            self._keep(layer, name, pending)
            self.deferred[name] = reason
            return
        if name in self._excluded:
            updatable.let_go()
            self._keep(layer, name, pending)
            self._fall_back(name, self._excluded[name])
            return
        streams = {}
        for key, placeholder in pending.placeholders.items():
            size = placeholder.numel() * torch.float8_e4m3fn.itemsize
            with shortage_explained(f"for the fp8 storage of {name}.{key}", size, self.account):
                storage = pending.plan.allocate(placeholder, pending.device)
            self._huge_pages.request(storage.weight)
            plan = pending.plan.parameter(placeholder, storage)
            stream = ParameterStream(
                f"{name}.{key}",
                placeholder,
                plan.grid,
                plan.quantizer,
                plan.storage,
                self.account,
                self._quantized,
                self.sources,
                pipeline,
            )
            streams[key] = (placeholder, stream)
        layer_stream = LayerStream(name, streams, functools.partial(self._return, layer))
        for placeholder in pending.placeholders.values():
            set_loader(placeholder, layer_stream.wrap(placeholder.weight_loader))  # type: ignore[attr-defined]
        self._streams[layer] = (layer_stream, pending.plan)

    def _materialize(self, pending: PendingLayer) -> None:
        for placeholder in pending.placeholders.values():
            materialize(placeholder, torch.empty_like(placeholder, device=pending.device))

    def _keep(self, layer: torch.nn.Module, name: str, pending: PendingLayer) -> None:
        """Leave a layer to stock, with an eye on what is loaded into it."""
        for key, placeholder in pending.placeholders.items():
            materialize(placeholder, torch.zeros_like(placeholder, device=pending.device))
            weight = KeptWeight(f"{name}.{key}", placeholder, self.sources)
            set_loader(placeholder, weight.wrap(placeholder.weight_loader))  # type: ignore[attr-defined]
            if not self.prequantized:
                self._kept.setdefault(layer, []).append(weight)

    def _quantized(self, size: int) -> None:
        self.progress.advance(size)

    def _return(self, layer: torch.nn.Module, stream: LayerStream, reason: str) -> None:
        self.updatable[stream.name].let_go()
        self._kept[layer] = [
            KeptWeight(part.name, stream.placeholders[key], self.sources, part.origins())
            for key, part in stream.streams.items()
        ]
        self._fall_back(stream.name, reason)

    def _fall_back(self, name: str, reason: str) -> None:
        self.fallback[name] = reason
        logger.warning("StreamFP8: %s is loaded as in stock SGLang: %s.", name, reason)

    def _settle(self, stream: LayerStream) -> None:
        for part in stream.streams.values():
            missing = [] if self.prequantized else part.settle_with_zeros()
            self.units += part.units - len(missing)
            self.direct_units += part.direct_units
            self._findings.note(stream.name, part, missing)


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
        attributes = {name: value for name, value in vars(module).items() if name not in _TORCH_ATTRIBUTES}
        for values in (module._parameters, module._buffers, attributes):
            for name, value in values.items():
                yield from _tensors_in(value, f"{prefix}.{name}" if prefix else name, _MOST_NESTED)


_TORCH_ATTRIBUTES = frozenset({"_parameters", "_buffers", "_modules"})
_MOST_NESTED = 3


def _tensors_in(value: Any, name: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple, dict)) and depth:
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, item in items:
            yield from _tensors_in(item, f"{name}[{key!r}]", depth - 1)


def stored_bytes(model: torch.nn.Module) -> int:
    """Bytes of all memory that the model's tensors hold, shared memory counted once."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for _, t in tensors_of(model))}
    return sum(storages.values())


def _changed(layer: torch.nn.Module, pending: PendingLayer) -> str | None:
    for name, placeholder in pending.placeholders.items():
        if layer._parameters.get(name) is not placeholder or storage_key(placeholder) != pending.storage_keys[name]:
            return name
    return None
