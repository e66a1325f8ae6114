# SPDX-License-Identifier: Apache-2.0
"""The overlay's load: what it adds to streaming itself.

Schemes that stock does not have, progress, what weight updates need to know, and a look at weights that are not
streamed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch

from sglang_overlay.core import sentinel
from sglang_overlay.core.errors import shortened
from sglang_overlay.core.executor import Executor, executor_for
from sglang_overlay.core.layer import LayerStream
from sglang_overlay.core.placeholders import materialize, set_loader
from sglang_overlay.core.stream import ParameterStream
from sglang_overlay.core.whole_rows import WholeRows
from sglang_overlay.errors import SettingsError, StagingMemoryError, StreamingUnavailableError, UnsupportedDtypeError
from sglang_overlay.load import eligibility, model_load, snapshots
from sglang_overlay.load.checkpoint_watch import CheckpointWatch
from sglang_overlay.load.diagnostics import Tolerance
from sglang_overlay.load.model_load import ModelLoad, PendingLayer
from sglang_overlay.load.pinned_ring import ring_executor_for
from sglang_overlay.load.ranks import parallel_ranks
from sglang_overlay.load.refusal import refuse
from sglang_overlay.load.stored_dtypes import NOT_SAID, QUANTIZED, StoredDtypes
from sglang_overlay.load.unstreamed import KeptWeight, UnstreamedParameters
from sglang_overlay.load.updatable_layer import UpdatableLayer
from sglang_overlay.observe.layer_times import LayerTimes
from sglang_overlay.observe.progress import Progress, SilentProgress, quantization_progress
from sglang_overlay.schemes import mxfp8, rows_over_ranks
from sglang_overlay.schemes.layer_plan import LayerPlan, ParameterPlan
from sglang_overlay.schemes.selection import SchemeSelection
from sglang_overlay.schemes.updatable_plan import UpdatablePlan, quantize_whole
from sglang_overlay.settings import ALLOW_MISSING_VARIABLE, MODE_VARIABLE, Mode, Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SettledLayer:
    """A streamed layer that is finished: its name, its units, those that came whole, and its bytes with scales."""

    name: str
    units: int
    direct_units: int
    size: int


class OverlayLoad(ModelLoad):
    """One load, as the user's settings want it.

    Args:
        settings: what the user asked for.
        device: where the model goes.
        obstacle: why online fp8 layers cannot be streamed in this load, if so known beforehand.
        excluded: why certain layers, by name, must take stock's path.
        executor: does the work; the device's unless given.
        is_part: whether settings that name layers may mean those of another model or pipeline stage.

    Attributes:
        settled: the streamed layers that are finished, in that order.
        times: when their units were quantized.
        missing: parameters that were not completely written from the checkpoint.
    """

    checkpoint: CheckpointWatch
    final: ClassVar[tuple[type[Exception], ...]] = (StagingMemoryError, SettingsError, StreamingUnavailableError)

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        obstacle: str | None = None,
        excluded: Mapping[str, str] = MappingProxyType({}),
        *,
        is_part: bool = False,
        executor: Executor | None = None,
    ) -> None:
        if executor is None:
            executor = ring_executor_for(device) if settings.pinned_ring else executor_for(device)
        super().__init__(obstacle, excluded, executor, CheckpointWatch(_tolerance(settings)))
        self.settings = settings
        self._is_part = is_part
        self.schemes = SchemeSelection(settings.schemes)
        self.abandoned = "switched off" if settings.mode is Mode.OFF else None
        self.progress: Progress = SilentProgress()
        self.updatable: dict[str, UpdatableLayer] = {}
        self.prequantized = False
        self.settled: list[SettledLayer] = []
        self.times = LayerTimes()
        self.missing: list[str] = []
        self._device = device
        self._kept: dict[torch.nn.Module, dict[str, KeptWeight]] = {}
        self._unstreamed: UnstreamedParameters | None = None
        self._is_online = False
        self._quantized_already: list[str] = []
        self._rows: dict[str, WholeRows] = {}
        self._narrowed: list[str] = []
        self._dtypes: StoredDtypes | None = None
        self._replacing: dict[torch.nn.Module, PendingLayer] = {}
        # What has to be done once, when the weights have been read.
        self._reading = contextlib.ExitStack()

    # -- building the model ------------------------------------------------------------------------------------------

    @staticmethod
    def covers(config: Any) -> bool:
        return ModelLoad.covers(config) or mxfp8.is_online(config)

    def admits(self, config: Any) -> bool:
        self._is_online |= self.settings.mode is not Mode.OFF and self.covers(config)
        return super().admits(config)

    def see(self, name: str, tensor: object) -> None:
        if isinstance(tensor, torch.Tensor) and tensor.dtype in QUANTIZED:
            self._quantized_already.append(name)
        super().see(name, tensor)

    def refuse(self, reason: str) -> None:
        """Say that the model is loaded as stock does.

        Raises:
            StreamingUnavailableError: streaming is required.
        """
        refuse(self.settings.required_by, reason)

    def adopt(self, model: torch.nn.Module) -> str | None:
        self.schemes.check_used((name for name, _ in model.named_modules()), is_part=self._is_part)
        reason = super().adopt(model)
        if reason is not None:
            return reason
        if self.abandoned is None:
            # Loaders that are not covered keep those of parameters for later (``flash_rl``).
            self._dtypes = StoredDtypes(model, self.sources)
        if self._streams:
            self._reading.enter_context(self.executor.reading(self.streamed_bytes))
        if self._streams and not self.prequantized:
            self._unstreamed = UnstreamedParameters(model, set(self._looked_after()))
            self._reading.callback(self._unstreamed.settle)
        if parallel_ranks().is_first:
            self.progress = quantization_progress(self.streamed_bytes)
        return None

    def expect_quantized(self) -> None:
        """What is read is fp8 already: upstream quantizes the empty parameters first and fills the result."""
        self.prequantized = True

    def placeholders(self) -> Iterator[tuple[str, torch.nn.Parameter, ParameterStream]]:
        """Every placeholder that waits to be written: its name, itself, and what takes the writes."""
        for layer, _ in self._streams.values():
            for key, stream in layer.streams.items():
                yield f"{layer.name}.{key}", layer.placeholders[key], stream

    @property
    def streamed_bytes(self) -> int:
        """Size of all fp8 weights to be filled."""
        streams = (stream for layer, _ in self._streams.values() for stream in layer.streams.values())
        return sum(stream.storage.weight.nbytes for stream in streams)

    def create_weights(
        self, create: Callable[[], None], layer: torch.nn.Module, dtype: torch.dtype, plan: LayerPlan
    ) -> None:
        self.executor.prepare()
        super().create_weights(create, layer, dtype, plan)

    def abandon(self, reason: str) -> None:
        self._reading.close()
        super().abandon(reason)
        self.updatable.clear()
        self._kept.clear()
        self._replacing.clear()

    # -- after the weights are read ----------------------------------------------------------------------------------

    def finish(self, layer: torch.nn.Module) -> LayerPlan | None:
        if layer in self._finished:
            return self._finished[layer]
        # Before upstream's post-processing, which may compute with weights that are marked.
        self._reading.close()
        kept = self._kept.get(layer, {})
        # Before it is quantized: marks are no weights.
        missing = {key: weight.missing() for key, weight in kept.items()}
        pending = self._replacing.pop(layer, None)
        if super().finish(layer) is None and pending is not None and _is_loaded(layer, pending):
            self._finished[layer] = self._quantize_whole(layer, pending, kept)
        self._note_kept(layer, missing)
        return self._finished.get(layer)

    def check(self, model: torch.nn.Module, model_config: Any) -> None:
        # First: a unit whose job failed is incomplete too.
        self.executor.close()
        self.executor.check()
        self._reading.close()
        self._forget_deleted(model)
        if self._is_online and self._quantized_already:
            self._tell_quantized()
        if self._narrowed:
            self._tell_narrowed()
        if self._unstreamed is not None:
            missing = self._unstreamed.missing(model_config)
            self.missing += missing
            for text in self._unstreamed.problems(missing):
                self.checkpoint.warn(text)
        snapshots.refresh(model)
        super().check(model, model_config)

    def close(self) -> None:
        """End what runs beside the load, and give all staging memory back."""
        self._reading.close()
        self.progress.close()
        if self._dtypes is not None:
            self._dtypes.restore()
        super().close()

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _note_kept(self, layer: torch.nn.Module, missing: Mapping[str, Sequence[int]]) -> None:
        """Tell of the weights of a layer that is left to stock, and forget them."""
        for key, weight in self._kept.pop(layer, {}).items():
            self.missing += [weight.name] if missing[key] else []
            self.checkpoint.note(weight.name.rpartition(".")[0], weight, missing[key])
            weight.let_go()

    def _forget_deleted(self, model: torch.nn.Module) -> None:
        """Layers that the model has deleted once it had read them, as minicpm3.py does: their memory must be free."""
        left = set(model.modules())
        for layer in self._kept.keys() - left:
            self._note_kept(layer, {key: weight.missing() for key, weight in self._kept[layer].items()})

    def _tell_quantized(self) -> None:
        """No weight loader got them as they are, or it would have refused: the model has cast or dropped them.

        Raises:
            UnsupportedDtypeError: streaming is required.
        """
        told = (
            f"the checkpoint holds {len(self._quantized_already)} tensors of fp8: {shortened(self._quantized_already)}"
        )
        if self.settings.mode is Mode.REQUIRE:
            raise UnsupportedDtypeError(f"{told}. {NOT_SAID}")
        self.checkpoint.warn(f"{told}. {NOT_SAID.removesuffix('.')}")

    def _tell_narrowed(self) -> None:
        """Scales of some rows depend on the number of ranks.

        Raises:
            StreamingUnavailableError: streaming is required.
        """
        text = rows_over_ranks.told(self._narrowed)
        if self.settings.mode is Mode.REQUIRE:
            refuse(f"{MODE_VARIABLE}={Mode.REQUIRE.value}", text)
        self.checkpoint.warn(text)

    def _looked_after(self) -> Iterator[str]:
        """Names of parameters that are loaded as streamed ones are, or filled by quantizing."""
        yield from (weight.name for weights in self._kept.values() for weight in weights.values())
        for stream, plan in self._streams.values():
            yield from (f"{stream.name}.{name}" for name in _updatable(plan).fills)

    def _start(self, layer: torch.nn.Module, name: str | None, pending: PendingLayer) -> None:
        if name is not None:
            plan = _updatable(pending.plan)
            self.updatable[name] = UpdatableLayer(name, layer, plan, pending.placeholders)
            if plan.replaces_stock or self._is_deferred(name):
                self._replacing[layer] = pending
        super()._start(layer, name, pending)

    def _is_deferred(self, name: str) -> bool:
        """Whether a layer is quantized here once upstream has read it."""
        return self.executor.quantizes_late and not self.prequantized and eligibility.why_deferred(name) is not None

    def _options(self, name: str, plan: ParameterPlan) -> dict[str, Any]:
        rows = rows_over_ranks.of(plan)
        if rows is not None:
            self._rows[name] = rows
        return {
            "quantized": functools.partial(self._quantized, name.rpartition(".")[0]),
            "rows": rows,
            "mark": sentinel.fill,
        }

    def _quantize_whole(
        self, layer: torch.nn.Module, pending: PendingLayer, kept: Mapping[str, KeptWeight]
    ) -> LayerPlan:
        """Quantize a layer that was loaded in high precision."""
        storages = {}
        for key, weight in pending.placeholders.items():
            storages[key] = pending.plan.allocate(key, weight, pending.device)
            plan = pending.plan.parameter(key, weight, storages[key])
            found = quantize_whole(replace(plan, quantizer=self.executor.quantizer(plan.quantizer)), weight.data)
            if key in kept:
                kept[key].largest = found
        pending.plan.register(layer, storages)
        return pending.plan

    def _keep(self, layer: torch.nn.Module, name: str, pending: PendingLayer) -> None:
        """Leave a layer to stock, with an eye on what is loaded into it."""
        self.updatable[name].let_go()
        is_marked = name in self._excluded and not self.prequantized
        for key, placeholder in pending.placeholders.items():
            materialize(placeholder, torch.zeros_like(placeholder, device=pending.device))
            if is_marked:
                sentinel.fill(placeholder)
            weight = KeptWeight(f"{name}.{key}", placeholder, self.sources, is_marked=is_marked)
            set_loader(placeholder, weight.wrap(placeholder.weight_loader))  # type: ignore[attr-defined]
            if not self.prequantized:
                self._kept.setdefault(layer, {})[key] = weight

    def _quantized(self, layer: str, size: int) -> None:
        self.times.note(layer)
        self.progress.advance(size)

    def _return(self, layer: torch.nn.Module, stream: LayerStream, reason: str) -> None:
        self.updatable[stream.name].let_go()
        self._kept[layer] = {
            key: KeptWeight(part.name, stream.placeholders[key], self.sources, part.origins(), is_marked=True)
            for key, part in stream.streams.items()
        }
        super()._return(layer, stream, reason)

    def _fall_back(self, name: str, reason: str) -> None:
        if self.settings.mode is Mode.REQUIRE:
            refuse(f"{MODE_VARIABLE}={Mode.REQUIRE.value}", f"{name}: {reason}")
        super()._fall_back(name, reason)

    def _manner(self, name: str) -> str:
        known = self.updatable.get(name)
        if known is not None and known.plan.replaces_stock:
            scales = ", with scales of this rank's columns alone" if rows_over_ranks.are_split(known.plan) else ""
            return f"quantized after it has been loaded whole{scales}"
        return super()._manner(name)

    def _settle(self, stream: LayerStream) -> None:
        units, direct_units = self.units, self.direct_units
        if self.prequantized:
            self._settle_unread(stream)
        else:
            super()._settle(stream)
        size = sum(part.storage.weight.nbytes + part.storage.scale.nbytes for part in stream.streams.values())
        self.settled.append(SettledLayer(stream.name, self.units - units, self.direct_units - direct_units, size))

    def _settle_unread(self, stream: LayerStream) -> None:
        """What fills the parameters comes later, and is fp8 already."""
        for part in stream.streams.values():
            self.units += part.units
            self.direct_units += part.direct_units
            self._note(stream.name, part, [])

    def _note(self, layer: str, part: ParameterStream, missing: Sequence[int]) -> None:
        self.missing += [part.name] if missing else []
        rows = self._rows.get(part.name)
        self._narrowed += [part.name] if rows is not None and rows.is_narrowed else []
        super()._note(layer, part, missing)


def current() -> OverlayLoad | None:
    """The load that is under way in this thread and may stream, or None."""
    found = model_load.current()
    return found if isinstance(found, OverlayLoad) else None


def _is_loaded(layer: torch.nn.Module, pending: PendingLayer) -> bool:
    """Whether upstream has left a layer the parameters that were loaded."""
    return all(layer._parameters.get(key) is weight for key, weight in pending.placeholders.items())


def _updatable(plan: LayerPlan) -> UpdatablePlan:
    if not isinstance(plan, UpdatablePlan):
        raise TypeError(f"{type(plan).__name__} is no plan of the overlay's")
    return plan


def _tolerance(settings: Settings) -> Tolerance:
    return Tolerance(
        missing=settings.allow_missing,
        missing_switch=f"{ALLOW_MISSING_VARIABLE}=1",
        not_finite=settings.mode is not Mode.REQUIRE,
        not_finite_switch=f"{MODE_VARIABLE}=1",
    )
