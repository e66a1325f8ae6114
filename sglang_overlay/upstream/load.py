# SPDX-License-Identifier: Apache-2.0
"""One model load: the owner of every streamed layer from ``create_weights`` to the end of loading."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from sglang_overlay.core import cpu_kernels
from sglang_overlay.core.capture import storage_key
from sglang_overlay.core.huge_pages import HugePages, free_huge_pages
from sglang_overlay.core.layer import LayerStream
from sglang_overlay.core.pinned_ring import PinnedRing, ring_for
from sglang_overlay.core.pipeline import Pipeline
from sglang_overlay.core.placeholders import materialize
from sglang_overlay.core.shortage import shortage_explained
from sglang_overlay.core.sources import CheckpointSources
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.core.stream import ParameterStream
from sglang_overlay.errors import PlaceholderLeakError, UnexpectedParametersError
from sglang_overlay.observe.progress import Progress, SilentProgress
from sglang_overlay.schemes.selection import SchemeSelection
from sglang_overlay.settings import Mode, Settings
from sglang_overlay.upstream import eligibility, snapshots, update
from sglang_overlay.upstream.findings import Findings, shortened
from sglang_overlay.upstream.guard import refuse
from sglang_overlay.upstream.plan import LayerPlan
from sglang_overlay.upstream.unstreamed import KeptWeight, UnstreamedParameters
from sglang_overlay.upstream.update import UpdatableLayer, set_loader

logger = logging.getLogger(__name__)


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
        settings: what the user asked for.
        device: where the model goes.
        obstacle: why online fp8 layers cannot be streamed in this load, if so known beforehand.
        excluded: why certain layers, by name, must take stock's path.
    """

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        obstacle: str | None = None,
        excluded: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.settings = settings
        self.schemes = SchemeSelection(settings.schemes)
        self.sources = CheckpointSources()
        self._device = device
        self._pipeline: Pipeline | None = None
        self._ring: PinnedRing | None = None
        # Half: reading the files needs free memory as well.
        self._huge_pages = HugePages(free_huge_pages() // 2)
        self.account = StagingAccount()
        self.deferred: dict[str, str] = {}
        self.fallback: dict[str, str] = {}
        self.abandoned = "switched off" if settings.mode is Mode.OFF else None
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
        self._replacing: dict[torch.nn.Module, PendingLayer] = {}
        self._finished: dict[torch.nn.Module, LayerPlan] = {}
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
            refuse(self.settings.required_by, self._obstacle)
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
        self.schemes.check_used()
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
        self._ring = ring_for(self._device) if self.settings.pinned_ring else None
        if self._ring is not None:
            logger.info("StreamFP8: what is read goes to %s through a pinned ring.", self._device)
        for layer, pending in self._pending.items():
            self._start(layer, names.get(layer), pending, self._pipeline)
        self._pending.clear()
        self._unnamed.clear()
        if self._streams and not self.prequantized:
            self._unstreamed = UnstreamedParameters(model, set(self._looked_after()))
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

    def finish(self, layer: torch.nn.Module) -> LayerPlan | None:
        """Replace a layer's placeholders by its quantized parameters.

        Returns:
            The plan of a layer that was quantized here, now or by an earlier call; None where upstream has to do it.
        """
        if layer in self._finished:
            return self._finished[layer]
        if self._unstreamed is not None:
            # Before upstream's post-processing, which may compute with them.
            self._unstreamed.settle()
        for weight in self._kept.pop(layer, ()):
            self._findings.note(weight.name.rpartition(".")[0], weight, weight.missing())
            weight.let_go()
        stream, plan = self._streams.get(layer, (None, None))
        if plan is not None and stream is not None and stream.streaming:
            self._settle(stream)
            plan.register(layer, {name: part.storage for name, part in stream.streams.items()})
            stream.streams.clear()
            stream.placeholders.clear()
            self._finished[layer] = plan
            self.layers += 1
        elif layer in self._replacing:
            self._finished[layer] = self._quantize_whole(layer, self._replacing.pop(layer))
        return self._finished.get(layer)

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
        if self._ring is not None:
            self._ring.close()
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
        if self._ring is not None:
            with contextlib.suppress(RuntimeError):
                # Where copies have failed, so has the load, with an error of its own.
                self._ring.close()
        for stream, _ in self._streams.values():
            stream.release()

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _looked_after(self) -> Iterator[str]:
        """Names of parameters that are loaded as streamed ones are, or filled by quantizing."""
        yield from (weight.name for weights in self._kept.values() for weight in weights)
        for stream, plan in self._streams.values():
            yield from (f"{stream.name}.{name}" for name in plan.fills)

    def _start(self, layer: torch.nn.Module, name: str | None, pending: PendingLayer, pipeline: Pipeline) -> None:
        if name is None:
            # Not part of the module tree, so stock would never quantize it either.
            self._materialize(pending)
            return
        updatable = self.updatable[name] = UpdatableLayer(name, layer, pending.plan, pending.placeholders)
        if pending.plan.replaces_stock:
            self._replacing[layer] = pending
        reason = eligibility.why_deferred(name)
        if reason is not None:
            updatable.let_go()
            self._keep(layer, name, pending)
            self.deferred[name] = reason
            return
        if name in self._excluded:
            updatable.let_go()
            self._keep(layer, name, pending)
            self._fall_back(name, self._excluded[name], pending.plan)
            return
        streams = {}
        for key, placeholder in pending.placeholders.items():
            size = placeholder.numel() * torch.float8_e4m3fn.itemsize
            with shortage_explained(f"for the fp8 storage of {name}.{key}", size, self.account):
                storage = pending.plan.allocate(key, placeholder, pending.device)
            self._huge_pages.request(storage.weight)
            plan = pending.plan.parameter(key, placeholder, storage)
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
                None if self._ring is None else self._ring.upload,
            )
            streams[key] = (placeholder, stream)
        layer_stream = LayerStream(name, streams, functools.partial(self._return, layer))
        for placeholder in pending.placeholders.values():
            set_loader(placeholder, layer_stream.wrap(placeholder.weight_loader))  # type: ignore[attr-defined]
        self._streams[layer] = (layer_stream, pending.plan)

    def _quantize_whole(self, layer: torch.nn.Module, pending: PendingLayer) -> LayerPlan:
        """Quantize a layer that was loaded in high precision, of a scheme that upstream does not know."""
        storages = {}
        for key, weight in pending.placeholders.items():
            storages[key] = pending.plan.allocate(key, weight, pending.device)
            pending.plan.parameter(key, weight, storages[key]).quantize_whole(weight.data)
        pending.plan.register(layer, storages)
        return pending.plan

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
        updatable = self.updatable[stream.name]
        updatable.let_go()
        self._kept[layer] = [
            KeptWeight(part.name, stream.placeholders[key], self.sources, part.origins())
            for key, part in stream.streams.items()
        ]
        self._fall_back(stream.name, reason, updatable.plan)

    def _fall_back(self, name: str, reason: str, plan: LayerPlan | None = None) -> None:
        self.fallback[name] = reason
        whole = plan is not None and plan.replaces_stock
        manner = "quantized after it has been loaded whole" if whole else "loaded as in stock SGLang"
        logger.warning("StreamFP8: %s is %s: %s.", name, manner, reason)

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


def process_streamed(original: Callable[..., None], method: Any, layer: torch.nn.Module) -> None:
    """Around ``process_weights_after_loading`` of a quantization method: what is left to do after quantizing."""
    if update.is_updating(layer):
        return
    load = current()
    plan = None if load is None else load.finish(layer)
    process = functools.partial(original, method, layer)
    if plan is None:
        process()
    else:
        plan.process(process, method, layer)


@contextlib.contextmanager
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
