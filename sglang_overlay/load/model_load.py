# SPDX-License-Identifier: Apache-2.0
"""One model load: the owner of every streamed layer from ``create_weights`` to the end of loading."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from sglang_overlay.core import sentinel
from sglang_overlay.core.allocation import OneElementAllocation
from sglang_overlay.core.bypass_capture import BypassCapture, PlaceholderReads
from sglang_overlay.core.capture import storage_key
from sglang_overlay.core.checkpoint_stream import CheckpointStream
from sglang_overlay.core.errors import LayerNotStreamableError
from sglang_overlay.core.executor import Executor, executor_for
from sglang_overlay.core.layer import LayerStream
from sglang_overlay.core.load_errors import PlaceholderLeakError, StagingMemoryError, UnexpectedParametersError
from sglang_overlay.core.messages import sentence, shortened
from sglang_overlay.core.moved_placeholders import MovedPlaceholders
from sglang_overlay.core.placeholders import set_loader
from sglang_overlay.core.shortage import is_shortage, memory_note, shortage_explained
from sglang_overlay.core.sources import CheckpointSources
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.errors import SettingsError, StreamingUnavailableError
from sglang_overlay.load import eligibility, snapshots
from sglang_overlay.load.checkpoint_watch import CheckpointWatch
from sglang_overlay.load.diagnostics import Tolerance
from sglang_overlay.load.fallback import Fallback, PendingLayer
from sglang_overlay.load.model_tensors import tensors_of
from sglang_overlay.load.pinned_ring import ring_executor_for
from sglang_overlay.load.ranks import parallel_ranks
from sglang_overlay.load.record import LoadRecord, StreamedLayer
from sglang_overlay.load.refusal import refuse
from sglang_overlay.load.stored_dtypes import StoredDtypes
from sglang_overlay.load.unstreamed import UnstreamedParameters
from sglang_overlay.load.updatable_layer import UpdatableLayer
from sglang_overlay.schemes import mxfp8, rows_over_ranks
from sglang_overlay.schemes.layer_plan import LayerPlan
from sglang_overlay.schemes.selection import SchemeSelection
from sglang_overlay.settings import ALLOW_MISSING_VARIABLE, MODE_VARIABLE, Mode, Settings

logger = logging.getLogger(__name__)


class ModelLoad:
    """One load, as the user's settings want it. Belongs to the loading thread.

    Loader threads reach the streams, which lock themselves, ``record.quantized``, and what is noted of a layer that
    goes back to stock: one entry of a dict at a time, and each layer goes back once.

    Args:
        settings: what the user asked for.
        device: where the model goes.
        obstacle: why online fp8 layers cannot be streamed in this load, if so known beforehand.
        excluded: why certain layers, by name, must not be streamed.
        executor: does the work; the device's unless given.
        told: which of ``excluded`` have been warned of by earlier attempts to load the model.
        watches_reads: whether layers whose weights the model reads while it is loaded are found, and go back to stock.
        is_part: whether settings that name layers may mean those of another model or pipeline stage.
        is_fp8: whether the model is quantized to fp8, online or in its checkpoint; else the load is only measured.

    Attributes:
        final: errors that building the model without placeholders would not mend.
        account: counts memory.
        sources: tells the names of checkpoint tensors.
        checkpoint: sees what is read, and says what is wrong with it.
        fallback: the layers that are not streamed.
        updatable: what weight updates need to know of each layer, by name.
        record: what has been streamed.
        abandoned: why the whole model is loaded as in stock, or None.
        is_covered: whether a model was built whose layers can be streamed.
    """

    final: ClassVar[tuple[type[Exception], ...]] = (StagingMemoryError, SettingsError, StreamingUnavailableError)

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        obstacle: str | None = None,
        excluded: Mapping[str, str] = MappingProxyType({}),
        *,
        told: Collection[str] = (),
        watches_reads: bool = False,
        is_part: bool = False,
        is_fp8: bool = True,
        executor: Executor | None = None,
    ) -> None:
        if executor is None:
            executor = ring_executor_for(device) if settings.pinned_ring else executor_for(device)
        self.settings = settings
        self.executor = executor
        self.schemes = SchemeSelection(settings.schemes)
        self.sources = CheckpointSources()
        self.account = StagingAccount()
        self.checkpoint = CheckpointWatch(_tolerance(settings))
        self.fallback = Fallback(excluded, executor, self.sources, self.checkpoint)
        self.updatable: dict[str, UpdatableLayer] = {}
        self._updatable: dict[torch.nn.Module, UpdatableLayer] = {}
        self.record = LoadRecord()
        self.abandoned = "switched off" if settings.mode is Mode.OFF else None
        self.is_covered = False
        self._told = told
        self._watches_reads = watches_reads
        self._is_part = is_part
        self._is_fp8 = is_fp8
        self._obstacle = obstacle
        self._is_online = False
        # Whether what is read fills what upstream makes of empty parameters, and is fp8 already.
        self._is_prequantized = False
        self._pending: dict[torch.nn.Module, PendingLayer] = {}
        self._unnamed: list[tuple[torch.nn.Module, str]] = []
        self._streams: dict[torch.nn.Module, tuple[LayerStream, PendingLayer]] = {}
        self._finished: dict[torch.nn.Module, LayerPlan] = {}
        # Storage of each placeholder that has been streamed -> its layer's name.
        self._placeholders: dict[int, str] = {}
        # Tensors that the model itself makes without memory, in stock too.
        self._without_memory: set[str] = set()
        self._is_trial = False
        self._moved = MovedPlaceholders()
        self._unstreamed: UnstreamedParameters | None = None
        self._dtypes: StoredDtypes | None = None
        self._narrowed: list[str] = []
        # What has to be done once, when the weights have been read.
        self._reading = contextlib.ExitStack()
        self._at_end: list[Callable[[], None]] = []

    # -- building the model ------------------------------------------------------------------------------------------

    @staticmethod
    def covers(config: Any) -> bool:
        """Whether layers of this quantization config can be streamed."""
        return eligibility.is_online_fp8(config) or mxfp8.is_online(config)

    def building_model(self) -> AbstractContextManager[None]:
        """Around upstream's way to build the model."""
        return self._moved

    def admits(self, config: Any) -> bool:
        """Whether layers of this quantization config are to be streamed.

        Raises:
            StreamingUnavailableError: streaming is required, and the load cannot be streamed.
        """
        if not self.covers(config):
            return False
        self._is_online |= self.settings.mode is not Mode.OFF
        if self._obstacle is not None and not self.abandoned:
            self.abandon(self._obstacle)
            self.refuse(self._obstacle)
        return not self.abandoned

    def create_weights(
        self, create: Callable[[], None], layer: torch.nn.Module, dtype: torch.dtype, plan: LayerPlan
    ) -> None:
        """Run upstream's ``create_weights`` with the weights of ``plan`` as placeholders."""
        if self._is_trial:
            with OneElementAllocation(dtype):
                create()
            return
        try:
            made = plan.create(create, layer, dtype)
        except UnexpectedParametersError as error:
            self.leave(layer, str(error))
            create()
            return
        keys = {name: storage_key(value) for name, value in made.parameters.items()}
        for placeholder in made.parameters.values():
            self._moved.add(placeholder, made.device)
        self._pending[layer] = PendingLayer(plan, made.device, made.parameters, keys)

    @contextmanager
    def set_aside(self, layer: torch.nn.Module) -> Iterator[None]:
        """Take the placeholders off a layer for a while."""
        pending = self._pending.get(layer)
        placeholders = {} if pending is None else pending.placeholders
        layer._parameters.update(dict.fromkeys(placeholders))
        try:
            yield
        finally:
            layer._parameters.update(placeholders)

    def leave(self, layer: torch.nn.Module, reason: str) -> None:
        """Note that a layer takes stock's path."""
        if not self._is_trial:
            self._unnamed.append((layer, reason))

    def adopt(self, model: torch.nn.Module, build: Callable[[], torch.nn.Module]) -> str | None:
        """Start streaming the layers of a model that has just been built.

        Args:
            model: as ``build`` has returned it.
            build: upstream's own way to build it.

        Returns:
            Why the model cannot be streamed at all, or None.

        Raises:
            SettingsError: the user's settings name layers that the model does not have.
            StreamingUnavailableError: streaming is required, and a layer cannot be streamed.
        """
        names = {module: name for name, module in model.named_modules()}
        self.schemes.check_used(names.values(), is_part=self._is_part)
        for layer, pending in self._pending.items():
            pending.follow(self._moved)
            changed = _changed(layer, pending)
            if changed is not None:
                name = f"{names.get(layer, type(layer).__name__)}.{changed}"
                return f"{name} is repacked while the model is built{_packed_into(model, layer, changed)}"
        displaced = self._displaced(model, build)
        if displaced:
            return f"{shortened(displaced)} would be where its weights are, which have no memory yet"
        for layer, reason in self._unnamed:
            self._fall_back(names.get(layer, type(layer).__name__), reason)
        for layer, pending in self._pending.items():
            self._start(layer, names.get(layer), pending)
        self._pending.clear()
        self._moved.clear()
        self._unnamed.clear()
        self._build_kernels()
        self._watch(model)
        self.record.begin(self.streamed_bytes)
        return None

    def abandon(self, reason: str) -> None:
        """Load the whole model as stock does, and let go of what is held for the one that was built."""
        self.abandoned = reason
        self._reading.close()
        self._drop_staged()
        for kept in (self._pending, self._moved, self._unnamed, self._streams, self.updatable, self._updatable):
            kept.clear()
        self.fallback.clear()

    def refuse(self, reason: str) -> None:
        """Say that the model is loaded as stock does.

        Raises:
            StreamingUnavailableError: streaming is required.
        """
        refuse(self.settings.required_by, reason)

    def expect_quantized(self) -> None:
        """What is read is fp8 already: upstream quantizes the empty parameters first and fills the result."""
        self._is_prequantized = True

    @property
    def building(self) -> bool:
        """Whether any placeholder has been made."""
        return bool(self._pending)

    @property
    def has_placeholders(self) -> bool:
        """Whether the model has been built with placeholders that stay while weights are read."""
        return bool(self.updatable.keys() - self.fallback.deferred.keys())

    # -- while the weights are read ----------------------------------------------------------------------------------

    def reading(self) -> AbstractContextManager[None]:
        """Around all of upstream's load."""
        return self.checkpoint.reading()

    def see(self, name: str, tensor: object) -> None:
        """Note an entry of the checkpoint, before the model gets it."""
        self.checkpoint.see(name, tensor)
        self.sources.offer(tensor, name)

    def placeholders(self) -> Iterator[tuple[str, torch.nn.Parameter, CheckpointStream]]:
        """Every placeholder that waits to be written: its name, itself, and what takes the writes."""
        for layer in self._layers:
            for key, stream in layer.streams.items():
                yield f"{layer.name}.{key}", layer.placeholders[key], stream

    @property
    def filled(self) -> set[str]:
        """Names of parameters, such as scales, that only quantizing writes."""
        return {f"{stream.name}.{name}" for stream, layer in self._streams.values() for name in layer.plan.fills}

    @property
    def streamed_bytes(self) -> int:
        """Size of all fp8 weights to be filled."""
        return sum(stream.storage.weight.nbytes for layer in self._layers for stream in layer.streams.values())

    def explain(self, error: Exception) -> Iterator[str]:
        """What an error that ended upstream's load does not say itself."""
        if is_shortage(error):
            yield memory_note(self.account)
        yield from self.checkpoint.explain(self._layers, was_read=self.fallback.was_read)

    # -- after the weights are read ----------------------------------------------------------------------------------

    def finish(self, layer: torch.nn.Module) -> LayerPlan | None:
        """Replace a layer's high-precision weights by its quantized parameters.

        Returns:
            The plan of a layer that was quantized here, now or by an earlier call; None where upstream has to do it.
        """
        if layer in self._finished:
            return self._finished[layer]
        # Before upstream's post-processing, which may compute with weights that are marked.
        self._reading.close()
        plan = self._finish_stream(layer) if layer in self._streams else self.fallback.finish(layer)
        if plan is not None:
            self._finished[layer] = plan
        return plan

    def note_processing(self, layer: torch.nn.Module, original: Callable[..., None], method: Any) -> None:
        """Upstream is about to process a layer that ``finish`` has looked at: updates may have to do so again."""
        known = self._updatable.get(layer)
        if known is not None:
            known.note_processing(original, method, is_quantized=layer in self._finished)

    def check(self, model: torch.nn.Module, model_config: Any) -> None:
        """Make sure that everything was written, and that nothing still refers to a placeholder.

        Raises:
            StreamFP8Error: as of ``CheckpointWatch.conclude``, or streaming is required and was not as it should be.
            PlaceholderLeakError: the model holds a tensor that was computed from one, and has no memory. Layers whose
                placeholder itself it holds are noted as lost instead.
        """
        # First: a unit whose job failed is incomplete too.
        self.executor.close()
        self.executor.check()
        self._reading.close()
        self.fallback.forget_deleted(model)
        if self._is_online:
            self.checkpoint.tell_quantized(is_error=self.settings.mode is Mode.REQUIRE)
        if self._narrowed:
            self._tell_narrowed()
        if self._unstreamed is not None:
            self.checkpoint.note_unstreamed(self._unstreamed, model_config)
        snapshots.refresh(model)
        self.checkpoint.conclude(model, model_config)
        if self.has_placeholders:
            self._check_leaks(model)

    def at_end(self, act: Callable[[], None]) -> None:
        """Have ``act`` called when the load has ended well: not where the model is loaded anew, or the load fails."""
        self._at_end.append(act)

    def end(self) -> None:
        """The load has ended well."""
        for act in self._at_end:
            act()

    def _check_leaks(self, model: torch.nn.Module) -> None:
        leaks = {name: tensor for name, tensor in tensors_of(model) if tensor.is_meta}
        computed = []
        for name in leaks.keys() - self._without_memory:
            kept = self._placeholders.get(storage_key(leaks[name]))
            if kept is None:
                computed.append(name)
            else:
                self.fallback.lost[kept] = f"the model keeps its weight as {name}"
        if computed and not self.fallback.lost:
            raise PlaceholderLeakError(
                f"computed from a weight that was being streamed, these hold no data: {shortened(sorted(computed))}"
            )

    def close(self) -> None:
        """End what runs beside the load, and give all staging memory back. To be called once, also after a failure."""
        self._reading.close()
        self.record.close()
        if self._dtypes is not None:
            self._dtypes.restore()
        # Where jobs or copies have failed, so has the load, with an error of its own.
        with suppress(RuntimeError):
            self.executor.close()
        self._drop_staged()

    # -- helpers -----------------------------------------------------------------------------------------------------

    @property
    def _layers(self) -> list[LayerStream]:
        # A copy: a loader thread may take a layer away.
        return [stream for stream, _ in list(self._streams.values())]

    def _displaced(self, model: torch.nn.Module, build: Callable[[], torch.nn.Module]) -> list[str]:
        """Names of tensors of a model that have no memory only because placeholders have none.

        Most models have no tensors without memory. Where one has, a trial tells which of them are so in stock.

        Args:
            model: just built with placeholders.
            build: builds it again.
        """
        placeholders = {key for pending in self._pending.values() for key in pending.storage_keys.values()}
        found = {
            name for name, tensor in tensors_of(model) if tensor.is_meta and storage_key(tensor) not in placeholders
        }
        if found:
            self._is_trial = True
            try:
                self._without_memory = {name for name, tensor in tensors_of(build()) if tensor.is_meta}
            finally:
                self._is_trial = False
        return sorted(found - self._without_memory)

    def _drop_staged(self) -> None:
        for layer in self._layers:
            layer.drop_staged()

    def _watch(self, model: torch.nn.Module) -> None:
        """Look at what is loaded into parameters that are not streamed."""
        if self._is_fp8 and self.abandoned is None:
            # Loaders that are not covered keep those of parameters for later (``flash_rl``).
            self._dtypes = StoredDtypes(model, self.sources)
        if self._streams:
            self._reading.enter_context(self.executor.reading())
            self._reading.enter_context(BypassCapture(self._layers))
            if self._watches_reads:
                self._reading.enter_context(PlaceholderReads())  # type: ignore[no-untyped-call]
        if self._streams and not self._is_prequantized:
            self._unstreamed = UnstreamedParameters(model, {*self.fallback.names(), *self.filled})
            self._reading.callback(self._unstreamed.settle)

    def _start(self, layer: torch.nn.Module, name: str | None, pending: PendingLayer) -> None:
        if name is None:
            # Not part of the module tree, so stock would never quantize it either.
            pending.allocate()
            return
        known = UpdatableLayer(name, layer, pending.plan, pending.placeholders)
        self.updatable[name] = self._updatable[layer] = known
        deferred, excluded = eligibility.why_deferred(name), self.fallback.excluded.get(name)
        if deferred is None and excluded is None:
            self._open(layer, name, pending)
            return
        if deferred is not None:
            self.fallback.deferred[name] = deferred
        elif excluded is not None:
            self._fall_back(name, excluded)
        self.updatable[name].release_placeholders()
        self.fallback.keep(layer, name, pending, is_read=not self._is_prequantized)

    def _open(self, layer: torch.nn.Module, name: str, pending: PendingLayer) -> None:
        """Stream a layer's parameters from now on."""
        streams = {
            key: (placeholder, self._stream(name, key, pending)) for key, placeholder in pending.placeholders.items()
        }
        on_return, on_loss = functools.partial(self._take_back, layer), functools.partial(self._lose, layer)
        layer_stream = LayerStream(name, streams, on_return, on_loss, parallel_ranks().tp.size)
        for placeholder in pending.placeholders.values():
            set_loader(placeholder, layer_stream.wrap(placeholder.weight_loader))  # type: ignore[attr-defined]
        self._streams[layer] = layer_stream, pending
        self._placeholders |= dict.fromkeys(map(storage_key, pending.placeholders.values()), name)

    def _stream(self, layer: str, key: str, pending: PendingLayer) -> CheckpointStream:
        placeholder, name = pending.placeholders[key], f"{layer}.{key}"
        size = placeholder.numel() * torch.float8_e4m3fn.itemsize
        with shortage_explained(f"for the fp8 storage of {name}", size, self.account):
            storage = pending.plan.allocate(key, placeholder, pending.device)
        plan = pending.plan.parameter(key, placeholder, storage)
        return CheckpointStream(
            name,
            placeholder,
            plan.grid,
            self.executor.quantizer(plan.quantizer),
            plan.storage,
            self.account,
            self.sources,
            executor=self.executor,
            progress=functools.partial(self.record.quantized, layer),
            rows=rows_over_ranks.of(plan),
            mark=sentinel.fill,
        )

    def _build_kernels(self) -> None:
        """Use each kernel once, before threads of a model's loader do: what is built then is built by one of them."""
        kinds = {part.kind: part for layer in self._layers for part in layer.streams.values()}
        for part in kinds.values():
            part.warm_up()

    def _take_back(self, layer: torch.nn.Module, stream: LayerStream, reason: str) -> None:
        """A layer cannot be streamed; its placeholders have memory now, with all that was written."""
        _, pending = self._streams.pop(layer)
        self.updatable[stream.name].release_placeholders()
        self.fallback.take_back(layer, stream, pending)
        if stream.name not in self.fallback.lost:
            self._fall_back(stream.name, reason)

    def _lose(self, layer: torch.nn.Module, stream: LayerStream, reason: str) -> None:
        """A layer cannot be streamed, and some of its values are lost."""
        self.fallback.lost[stream.name] = reason
        self._take_back(layer, stream, reason)

    def _fall_back(self, name: str, reason: str) -> None:
        """Say that a layer is not streamed.

        Raises:
            StreamingUnavailableError: streaming is required.
        """
        if self.settings.mode is Mode.REQUIRE:
            refuse(f"{MODE_VARIABLE}={Mode.REQUIRE.value}", f"{name}: {reason}")
        self.fallback.reasons[name] = reason
        if name in self._told:
            return
        known, manner = self.updatable.get(name), "loaded as in stock SGLang"
        if known is not None and known.plan.replaces_stock:
            scales = ", with scales of this rank's columns alone" if rows_over_ranks.are_split(known.plan) else ""
            manner = f"quantized after it has been loaded whole{scales}"
        logger.warning("StreamFP8: %s is %s: %s", name, manner, sentence(reason))

    def _finish_stream(self, layer: torch.nn.Module) -> LayerPlan:
        stream, pending = self._streams[layer]
        try:
            replaced = _changed(layer, pending)
            if replaced is not None:
                raise LayerNotStreamableError(
                    f"{stream.name}.{replaced}", f"its {replaced} is replaced while the model is loaded"
                )
            self._settle(stream)
        except LayerNotStreamableError as error:
            stream.drop_staged()
            self.fallback.lost[stream.name] = error.reason
        pending.plan.register(layer, {name: part.storage for name, part in stream.streams.items()})
        stream.finish()
        return pending.plan

    def _settle(self, stream: LayerStream) -> None:
        """Note what became of a layer's units."""
        units = direct_units = size = 0
        if not self._is_prequantized:
            self.checkpoint.note_misfits(stream)
        for part in stream.streams.values():
            # What fills the parameters comes later where it is fp8 already.
            missing: Sequence[int] = [] if self._is_prequantized else part.settle(zeros=True)
            self.checkpoint.note(stream.name, part, missing)
            # Dummy weights are given to no loader, and are nobody's rows.
            if part.rows is not None and part.rows.is_narrowed and not self._is_prequantized:
                self._narrowed.append(part.name)
            units += part.units - len(missing)
            direct_units += part.direct_units
            size += part.storage.weight.nbytes + part.storage.scale.nbytes
        self.record.layers.append(StreamedLayer(stream.name, units, direct_units, size))

    def _tell_narrowed(self) -> None:
        """Scales of some rows depend on the number of ranks.

        Raises:
            StreamingUnavailableError: streaming is required.
        """
        text = rows_over_ranks.narrowed_note(self._narrowed)
        if self.settings.mode is Mode.REQUIRE:
            refuse(f"{MODE_VARIABLE}={Mode.REQUIRE.value}", text)
        self.checkpoint.warn(text)


def _changed(layer: torch.nn.Module, pending: PendingLayer) -> str | None:
    for name, placeholder in pending.placeholders.items():
        if layer._parameters.get(name) is not placeholder or storage_key(placeholder) != pending.storage_keys[name]:
            return name
    return None


def _packed_into(model: torch.nn.Module, layer: torch.nn.Module, name: str) -> str:
    """Says which tensors, beside parameters, share the memory of a parameter: upstream does not quantize these."""
    weight = layer._parameters.get(name)
    if weight is None:
        return ""
    others = [
        found
        for found, tensor in tensors_of(model)
        if not isinstance(tensor, torch.nn.Parameter) and storage_key(tensor) == storage_key(weight)
    ]
    return f", into {shortened(others)}, which the model keeps in high precision" if others else ""


def _tolerance(settings: Settings) -> Tolerance:
    return Tolerance(
        missing=settings.allow_missing,
        missing_switch=f"{ALLOW_MISSING_VARIABLE}=1",
        not_finite=settings.mode is not Mode.REQUIRE,
        not_finite_switch=f"{MODE_VARIABLE}=1",
    )


_current: ContextVar[ModelLoad | None] = ContextVar("streamfp8_load", default=None)


def current() -> ModelLoad | None:
    """The load that is under way in this thread and may stream, or None."""
    return _current.get()


@contextmanager
def under_way(load: ModelLoad) -> Iterator[None]:
    """Make ``load`` the current one."""
    token = _current.set(load)
    try:
        yield
    finally:
        _current.reset(token)
