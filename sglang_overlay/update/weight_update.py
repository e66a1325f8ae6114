# SPDX-License-Identifier: Apache-2.0
"""Weight updates: high-precision weights into the fp8 storage of a model that is being served.

SGLang updates a model by calling its ``load_weights`` again, once (from disk) or many times between begin and end of a
session (tensors, a process group). Requests may be answered between two calls, so:

1. ``UpdatableModel`` keeps, from the first load, each layer's placeholders and upstream's loaders, but no weights.
2. ``WeightUpdate`` lives from begin to end. It gives each placeholder a stream into the storage that is being served,
   and holds incomplete units.
3. While ``load_weights`` runs, and only then, each layer looks as before its first quantization: placeholders under
   the parameters' names, no scales (``WeightUpdate.loading``).
4. Afterwards the same fp8 parameters are back, so references to their memory (CUDA graphs) stay valid.

A unit is replaced when all of it has been sent: in high precision, or already quantized in the served layout, with its
scales. Everything is copied to host memory before it is overwritten (``undo.py``). So after a failed call the weights
are those of before that call; after an update that failed, or ended with incomplete units, those of before the update.
No path writes a high-precision value into quantized memory (``update_capture.py``).

Without sessions (before 0.5.21) an update by tensors stays open while weights wait for later calls. Each call that
succeeds is kept for good. What waits is dropped when a tensor comes again, or an update from disk or by ipc begins.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sglang_overlay.core.capture import WriteSink, storage_key
from sglang_overlay.core.executor import Executor
from sglang_overlay.core.full_precision import FullPrecisionParameter
from sglang_overlay.core.loader_calls import LoaderCalls, WatchedSink
from sglang_overlay.core.messages import shortened
from sglang_overlay.core.quantizers import units_not_finite
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.core.tensor_names import PACKED
from sglang_overlay.errors import PartialUpdateError, StreamFP8Error, UnsupportedWriteError, WeightUpdateError
from sglang_overlay.load.diagnostics import WantedShapes, kept_misfits
from sglang_overlay.load.model_tensors import tensors_of
from sglang_overlay.load.ranks import parallel_ranks
from sglang_overlay.load.stored_dtypes import QUANTIZED
from sglang_overlay.load.unstreamed import missed
from sglang_overlay.load.updatable_layer import UpdatableLayer
from sglang_overlay.observe.weights_report import SESSION, UpdateReport
from sglang_overlay.schemes import rows_over_ranks
from sglang_overlay.schemes.layer_plan import quantize_whole
from sglang_overlay.update import cache_scales
from sglang_overlay.update.loaders_view import (
    aliases_shown,
    layers_shown,
    load_weights_given,
    loaders_wrapped,
    notes_kept,
    wrapped_layers,
)
from sglang_overlay.update.ready_values import ReadyValues, as_served
from sglang_overlay.update.rearranged import RearrangedLayer
from sglang_overlay.update.tensor_attributes import TensorAttributes
from sglang_overlay.update.tensor_groups import TensorGroups
from sglang_overlay.update.undo import Bindings, UndoableQuantizer, UndoLog
from sglang_overlay.update.update_capture import GivenTensors, ServedMemory, UpdateCapture
from sglang_overlay.update.update_sources import UpdateSources
from sglang_overlay.update.update_stream import UpdateStream

if TYPE_CHECKING:
    from sglang_overlay.core.layer import WeightLoader
    from sglang_overlay.core.stream import Storage
    from sglang_overlay.schemes.layer_plan import LayerPlan, ParameterPlan

logger = logging.getLogger(__name__)

NOTHING_KNOWN = WantedShapes()


class WeightUpdate:
    """One update, from begin to end. Belongs to the updating thread; loader threads reach only the sinks.

    Args:
        layers: of the model.
        executor: does the work; by default the plain one.
        wanted: the shapes that the model expects of checkpoint tensors.

    Attributes:
        given: the tensors that upstream was given in the current call.
        is_late: whether ``finish`` has quantized units that the calls before had brought.
        is_session: whether it consists of the calls between a begin and an end.
        calls: number of its calls, by kind.
        failed_calls: how many of them were undone.
        failure: why the update is undone, if it is.
        began: by ``time.perf_counter``.
    """

    def __init__(
        self, layers: Iterable[UpdatableLayer], executor: Executor | None = None, wanted: WantedShapes = NOTHING_KNOWN
    ) -> None:
        self.sources = UpdateSources()
        self.account = StagingAccount()
        self.given = GivenTensors()
        self.is_late = False
        self.is_session = False
        self.calls: Counter[str] = Counter()
        self.failed_calls = 0
        self.failure: str | None = None
        self.began = time.perf_counter()
        self._undo = UndoLog()
        self._wanted = wanted
        self._calls = LoaderCalls(parallel_ranks().tp.size, lambda tensor: self.given.name_of(tensor) or "")
        self._executor = Executor() if executor is None else executor
        self._layers = {layer.module: layer for layer in layers}
        self._wrappers: dict[torch.nn.Module, UpdatableLayer] = {}
        self._streams: dict[str, UpdateStream] = {}
        self._whole: dict[str, tuple[FullPrecisionParameter, Callable[[torch.Tensor], Any] | None]] = {}
        self._rearranged: dict[str, RearrangedLayer] = {}
        self._sinks: dict[int, WatchedSink] = {}
        self._take_values: dict[int, torch.dtype] = {}
        self._quantized: dict[int, str] = {}
        self._replaced: dict[str, None] = {}
        self._damaged: list[str] = []
        self._unrepeated: dict[str, None] = {}
        self._direct: dict[str, None] = {}
        scales = [scale for layer in self._layers.values() for scale in layer.scales.values()]
        # By what follows "weight" in the names of tensors and of parameters.
        self._scale_dtypes = {_suffix(name): scale.dtype for name, scale in scales}
        self._groups = TensorGroups((layer.name for layer in self._layers.values()), self.account)
        self._thread = threading.local()
        self._bindings: list[Bindings | None] = [None]
        self._saved: dict[str, Any] | None = None
        self._is_under_way = False
        try:
            with torch.inference_mode(mode=False):
                for layer in self._layers.values():
                    self._open(layer)
        except BaseException:
            self.close()
            raise
        self._names = {sink.name for sink in self._sinks.values()}

    def __contains__(self, module: torch.nn.Module) -> bool:
        return module in self._layers or module in self._wrappers

    def takes(self, name: str) -> bool:
        """Whether this update quantizes, or refuses, high-precision values for a parameter of this name."""
        return name in self._names and _suffix(name) not in self._scale_dtypes

    # -- calls -------------------------------------------------------------------------------------------------------

    def begin_call(self) -> None:
        """Begin one of several calls: ``undo_call`` goes back to here."""
        self.given = GivenTensors()
        self._undo.begin_call()
        self._bindings.append(None)
        self._saved = {
            "streams": {name: stream.saved() for name, stream in self._streams.items()},
            "whole": {name: parameter.saved() for name, (parameter, _) in self._whole.items()},
            "rearranged": {name: layer.saved() for name, layer in self._rearranged.items()},
            "groups": self._groups.saved(),
            "replaced": dict(self._replaced),
            "damaged": list(self._damaged),
            "direct": dict(self._direct),
        }

    def drop_parts(self) -> None:
        """Drop what earlier calls have brought of incomplete units: this one brings a whole checkpoint.

        A trainer that has died leaves a session open. What it sent last must not be quantized with what comes now.
        """
        self._drop_staged()
        self._groups.restore({})

    def keep_call(self) -> None:
        """End the current call, which succeeded; nothing if none is under way."""
        if self._saved is None:
            return
        self._saved = None
        self._undo.keep_call()
        last = self._bindings.pop()
        self._bindings[-1] = self._bindings[-1] or last

    def note_repeated(self) -> None:
        """The current call has brought what calls that failed were to bring. ``undo_call`` expects it again."""
        for name in self.given.names:
            self._unrepeated.pop(name, None)

    def undo_call(self, names: Iterable[str] = ()) -> None:
        """Go back to before the current call. Its tensors have to be sent again before the update ends.

        Args:
            names: of the call's tensors, in addition to those that upstream was given.
        """
        saved, self._saved = self._saved, None
        self.failed_calls += 1
        self._undo.undo_call()
        _put_back(self._bindings.pop())
        if saved is None:
            return
        for name, stream in self._streams.items():
            stream.restore_call(saved["streams"][name])
        for name, (parameter, _) in self._whole.items():
            parameter.restore(saved["whole"][name])
        for name, layer in self._rearranged.items():
            layer.restore(saved["rearranged"][name])
        self._groups.restore(saved["groups"])
        self._replaced, self._damaged, self._direct = saved["replaced"], saved["damaged"], saved["direct"]
        self.expect_again([*self.given.names, *names])

    def expect_again(self, names: Iterable[str]) -> None:
        """Require these tensors, of a call that failed, to be sent again before the update ends."""
        self._unrepeated.update(dict.fromkeys(names))

    def forget_undo(self) -> None:
        """Keep what has been replaced so far: only calls from here on can be undone."""
        self._undo.forget()
        self._bindings = [None]

    def undo(self) -> None:
        """Restore everything that was overwritten since the update began."""
        # First, since workers may still be writing.
        self._executor.close()
        self._undo.undo()
        for bindings in reversed(self._bindings):
            _put_back(bindings)

    @contextmanager
    def loading(self, model: torch.nn.Module) -> Iterator[None]:
        """Context for a call of ``load_weights``, including what upstream does before and after it.

        Raises:
            WeightUpdateError: a layer cannot take what upstream's loader writes, or upstream has left tensors in the
                model that cannot be served.
        """
        self._bindings[-1] = self._bindings[-1] or Bindings(model)
        if not self._is_under_way:
            self._is_under_way = True
            cache_scales.restore(model)
        self._wrappers = dict(wrapped_layers(model, self._layers.values()))
        derived = TensorAttributes(model)
        served, without_memory = self._served(model)
        token = _current.set(self)
        self._thread.inside = True
        self._calls.misfits.clear()
        self._capture = functools.partial(UpdateCapture, self._sinks, self._take_values, served, self.given)
        try:
            with (
                aliases_shown(model, self._layers.values(), self._wrappers),
                layers_shown(self._layers.values(), self._wrap),
                loaders_wrapped(model, self._wrap),
                load_weights_given(model, self._offered),
                notes_kept(model),
                self._whole_quantized(),
                self._capture(),
            ):
                yield
                self._refuse_misfits()
        except UnsupportedWriteError as error:
            raise WeightUpdateError(str(error)) from error
        except KeyError as error:
            self._explain(error)
            raise
        finally:
            self._thread.inside = False
            _current.reset(token)
            changed = derived.keep_memory(self._undo)
        if changed:
            raise WeightUpdateError(
                "upstream made these tensors anew in another form, so they keep their old memory and values: "
                f"{shortened(changed)}. Load the new weights by starting the server with them"
            )
        leaks = [name for name, tensor in tensors_of(model) if tensor.is_meta and name not in without_memory]
        if leaks:
            raise WeightUpdateError(
                "computed from a weight that is quantized while it is read, these tensors hold no data: "
                f"{shortened(leaks)}. Load the new weights by starting the server with them"
            )

    def write_direct(
        self, model: torch.nn.Module, tensors: Iterable[tuple[str, torch.Tensor]], load: Callable[[Any], None]
    ) -> None:
        """Have upstream load tensors into the served parameters with these names.

        Args:
            model: the model that is updated.
            tensors: names of parameters, and values in the served form.
            load: upstream's own function.

        Raises:
            WeightUpdateError: values would be cast from or to a quantized dtype.
        """
        self._bindings[-1] = self._bindings[-1] or Bindings(model)
        known = dict(model.named_parameters())
        tensors = [(name, self._as_served(name, tensor)) for name, tensor in tensors]
        for name, tensor in tensors:
            self.given.offer(name, tensor)
            weight = known.get(name)
            if weight is None:
                continue
            _refuse_cast(name, weight.dtype, tensor.dtype)
            self._undo.keep(weight)
            self.given.note([tensor])
            self._direct[name] = None
        load(tensors)

    def finish(self, model: torch.nn.Module) -> None:
        """Quantize covered units that had to wait for the end, and check that the update is complete.

        Raises:
            PartialUpdateError: some units were sent only in part.
            WeightUpdateError: weights contradict each other, or a call failed and its weights were not sent again.
        """
        self._executor.close()
        self._executor.check()
        if self._unrepeated:
            raise WeightUpdateError(
                f"a call of this update failed, and what it was to bring has not come since: "
                f"{shortened(list(self._unrepeated))}"
            )
        problems = [*self._incomplete, *self._mixed, *self._unpaired(model)]
        if problems:
            raise PartialUpdateError(
                f"the update ended with weights of which only a part came: {shortened(problems)}. One scale covers a "
                "whole unit, so send what belongs together in one update: gate_proj with up_proj, q_proj with k_proj "
                "and v_proj, q_a_proj with kv_a_proj_with_mqa, quantized values with their scales"
                f"{f'. This model took none of {shortened(self.given.unused)}' if self.given.unused else ''}"
            )
        rearranged = self._rearranged.values()
        self.is_late = any(layer.is_incomplete for layer in rearranged)
        self.is_late |= any(stream.has_waiting_units for stream in self._streams.values())
        for layer in rearranged:
            layer.finish()
        conflicts = [error for stream in self._streams.values() if (error := stream.conflict)]
        if conflicts:
            raise WeightUpdateError(str(conflicts[0])) from conflicts[0]
        found = units_not_finite([stream.magnitudes for stream in self._streams.values()])
        self._damaged += [
            name
            for (name, stream), units in zip(self._streams.items(), found, strict=True)
            if stream.has_replaced(units)
        ]
        self._damaged += [name for layer in rearranged for name in layer.damaged]
        if self._damaged:
            logger.warning(
                "StreamFP8: the weight update put NaN or Inf into %d parameters: %s. Expect garbage.",
                len(self._damaged),
                shortened(self._damaged),
            )
        narrowed = [name for name, each in self._all() if each.has_narrowed_rows]
        if narrowed:
            logger.warning("StreamFP8: %s.", rows_over_ranks.narrowed_note(narrowed))
        logger.info(
            "StreamFP8: weight update: %d units of %d layers replaced in place, at most %.1f MB staged, and %.1f MB of "
            "replaced values kept to undo it.",
            self.units[0],
            len(self.replaced),
            self.account.peak / 1e6,
            self._undo.bytes / 1e6,
        )

    def close(self) -> None:
        """Close the executor and release all staging memory. May be called more than once."""
        self._executor.close()
        self._undo.forget()
        self._drop_staged()

    @property
    def replaced(self) -> list[str]:
        """Names of the fp8 layers that hold some new values."""
        names = dict.fromkeys(
            name.rpartition(".")[0] for name, stream in self._streams.items() if stream.replaced_units
        )
        names.update(dict.fromkeys(name for name, layer in self._rearranged.items() if layer.replaced_units))
        return [*names, *self._replaced]

    @property
    def units(self) -> tuple[int, int]:
        """Number of units that hold new values, and of all."""
        parts = [each for _, each in self._all()]
        return sum(each.replaced_units for each in parts), sum(each.units for each in parts)

    def report(self, model: torch.nn.Module, model_config: Any) -> UpdateReport:
        """What became of the update, which is about to be closed."""
        kind = SESSION if self.is_session else next(iter(self.calls), SESSION)
        seconds, calls = time.perf_counter() - self.began, dict(self.calls)
        if self.failure is not None:
            return UpdateReport(kind, seconds, self.failure, calls, self.failed_calls)
        units, all_units = self.units
        untouched = tuple(self.untouched(model, model_config))
        replaced = self._undo.bytes
        return UpdateReport(kind, seconds, None, calls, self.failed_calls, units, all_units, replaced, untouched)

    def untouched(self, model: torch.nn.Module, model_config: Any) -> list[str]:
        """Names of parameters that a complete checkpoint would replace, but this update has not, or only in part."""
        left = {name: stream.units - stream.replaced_units for name, stream in self._streams.items()}
        told = [f"{name} ({count} of {self._streams[name].units} units)" for name, count in left.items() if count]
        told += [name for name in self._whole if name.rpartition(".")[0] not in {*self._replaced, *self._rearranged}]
        told += [name for layer in self._rearranged.values() if not layer.replaced_units for name in layer.parameters]
        written, mine = self._undo.storages, self._names | set(self._quantized.values())
        plain = {name: storage_key(weight) for name, weight in model.named_parameters() if name not in mine}
        return told + missed(
            model, [name for name, key in plain.items() if key not in written and key not in self._quantized],
            [name for name, key in plain.items() if key in written], model_config,
        )  # fmt: skip

    def waiting(self, model: torch.nn.Module) -> list[str]:
        """What still needs tensors of later calls. Empty if these would not help: then ``finish`` says why."""
        if self._mixed or self._unpaired(model):
            return []
        return [*self._incomplete, *(f"{name} (its call failed)" for name in self._unrepeated)]

    @property
    def layers(self) -> list[str]:
        """Names of the layers that the update may replace."""
        return [layer.name for layer in self._layers.values()]

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the model was written to."""
        return not self._undo.storages and not self.replaced

    def _drop_staged(self) -> None:
        for stream in self._streams.values():
            stream.drop_staged()
        for parameter, _ in self._whole.values():
            parameter.reset()
        for layer in self._rearranged.values():
            layer.drop()

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _open(self, layer: UpdatableLayer) -> None:
        if layer.is_rearranged:
            self._open_rearranged(layer)
            return
        storages = None if layer.is_deleted else layer.plan.registered(layer.module, layer.placeholders)
        for key, placeholder in layer.placeholders.items():
            name = f"{layer.name}.{key}"
            if layer.is_deleted:
                sink: WriteSink = self._whole_sink(name, placeholder, layer.device)
            elif storages is None:
                sink = _Refusal(name)
            else:
                sink = self._sink(layer, key, storages[key])
            self._watch(placeholder, sink)
            if isinstance(sink, _Refusal) and key in layer.scales:
                self._watch(layer.scales[key][1], sink)

    def _open_rearranged(self, layer: UpdatableLayer) -> None:
        rearranged = RearrangedLayer(layer, functools.partial(self._stream, layer), self._undo, self.account)
        self._rearranged[layer.name] = rearranged
        for key, weight in layer.module._parameters.items():
            if weight is not None:
                self._quantized[storage_key(weight)] = f"{layer.name}.{key}"
        for placeholder, sink in rearranged.sinks():
            self._watch(placeholder, sink)
        for placeholder, dtype in rearranged.served_dtypes:
            if not layer.reads_whole:
                self._take_values[storage_key(placeholder)] = dtype
                continue
            name = self._sinks[storage_key(placeholder)].name
            quantize = functools.partial(rearranged.write_all, name.rpartition(".")[2])
            self._watch(placeholder, self._whole_sink(name, placeholder, rearranged.device, quantize))

    def _sink(self, layer: UpdatableLayer, key: str, storage: Storage) -> WriteSink:
        name, placeholder = f"{layer.name}.{key}", layer.placeholders[key]
        self._quantized[storage_key(storage.weight)] = name
        self._quantized[storage_key(storage.scale)] = f"the scale of {name}"
        if layer.reads_whole:
            plan = self._plan(layer.plan, key, placeholder, storage, self._undo)
            return self._whole_sink(name, placeholder, storage.weight.device, functools.partial(quantize_whole, plan))
        stream, ready = self._stream(layer, key, layer.plan, storage, self._undo)
        if ready is not None:
            self._watch(layer.scales[key][1], ready)
        self._streams[name] = stream
        self._take_values[storage_key(placeholder)] = storage.weight.dtype
        return stream

    def _watch(self, placeholder: torch.nn.Parameter, sink: WriteSink) -> None:
        self._sinks[storage_key(placeholder)] = WatchedSink(sink, placeholder.shape, self._calls.under_way)

    def _whole_sink(
        self,
        name: str,
        placeholder: torch.nn.Parameter,
        device: torch.device,
        quantize: Callable[[torch.Tensor], Any] | None = None,
    ) -> WriteSink:
        sink = FullPrecisionParameter(name, placeholder, device)
        self._whole[name] = (sink, quantize)
        return sink

    def _plan(
        self, plan: LayerPlan, key: str, placeholder: torch.nn.Parameter, storage: Storage, undo: UndoLog
    ) -> ParameterPlan:
        found = plan.parameter(key, placeholder, storage)
        quantizer = self._executor.quantizer(found.quantizer)
        return replace(found, quantizer=UndoableQuantizer(quantizer, storage.scale, undo))

    def _stream(
        self, layer: UpdatableLayer, key: str, layer_plan: LayerPlan, storage: Storage, undo: UndoLog
    ) -> tuple[UpdateStream, ReadyValues | None]:
        """What takes a weight of a layer, by ``layer_plan`` into ``storage``; ``undo`` keeps what it overwrites."""
        name, placeholder = f"{layer.name}.{key}", layer.placeholders[key]
        plan = self._plan(layer_plan, key, placeholder, storage, undo)
        ready = None
        if key in layer.scales:
            scale_name, scale = layer.scales[key]
            ready = ReadyValues(name, plan.grid, plan.storage, scale, f"{layer.name}.{scale_name}", undo, self.account)
        stream = UpdateStream(
            name,
            placeholder,
            plan.grid,
            plan.quantizer,
            plan.storage,
            self.account,
            self.sources,
            ready=ready,
            under_way=self._calls.under_way,
            executor=self._executor,
            rows=rows_over_ranks.of(plan),
        )
        return stream, ready

    def _served(self, model: torch.nn.Module) -> tuple[ServedMemory, set[str]]:
        """All memory of the model as it is served, and names of tensors that the model itself leaves without any.

        To be called while no placeholders are shown.
        """
        quantized: dict[int, str] = dict(self._quantized)
        others: dict[int, str] = {}
        without_memory = set()
        for name, tensor in tensors_of(model):
            if tensor.is_meta:
                without_memory.add(name)
            else:
                (quantized if tensor.dtype in QUANTIZED else others).setdefault(storage_key(tensor), name)
        return ServedMemory(quantized, others, self._undo), without_memory

    @contextmanager
    def _offered(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        """``weights``, each noted in ``given``; tensors that only load together come together.

        A list's tensors stay as they are until ``load_weights`` returns, so jobs may read them until then. An iterator
        may reuse the memory of one for the next.
        """
        for _, tensor in weights if isinstance(weights, (list, tuple)) else ():
            self.sources.lend(tensor)
        try:
            with self._executor.reading():
                yield self._groups.complete(self._noted(weights))
            self._executor.check()
            for _, each in self._all():
                each.copy_lent()
        finally:
            self.sources.take_back()

    def _noted(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, sent in weights:
            tensor = self._as_served(name, sent)
            self.given.offer(name, tensor)
            yield name, tensor

    def _as_served(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        served = self._scale_dtypes.get(_suffix(name))
        # A pickled file may hold anything.
        return tensor if served is None or not isinstance(tensor, torch.Tensor) else as_served(name, tensor, served)

    @property
    def _incomplete(self) -> list[str]:
        """Weights of which only a part has come."""
        found = [problem for stream in self._streams.values() if (problem := stream.incomplete)]
        found += [name for name, (parameter, _) in self._whole.items() if parameter.is_partial]
        found += [missing for layer in self._rearranged.values() for missing in layer.missing]
        return [*found, *self._groups.waiting]

    @property
    def _mixed(self) -> list[str]:
        """Weights of which units came both in high precision and quantized."""
        return [problem for stream in self._streams.values() if (problem := stream.mixed)]

    def _unpaired(self, model: torch.nn.Module) -> list[str]:
        """Of the tensors sent by parameter name, values without their scales, and the reverse."""
        known = dict(model.named_parameters()) if self._direct else {}
        pairs = [
            (name, f"{name}{suffix}") for name in known for suffix in ("_scale", "_scale_inv")
            if f"{name}{suffix}" in known and known[name].dtype in QUANTIZED
        ]  # fmt: skip
        return [
            f"{weight} ({'values without their scales' if weight in self._direct else 'scales without their values'})"
            for weight, scale in pairs
            if (weight in self._direct) != (scale in self._direct)
        ]

    def _wrap(self, name: str, loader: WeightLoader) -> WeightLoader:
        """Upstream's loader of a weight, captured also if it runs in another thread; its errors name the weight."""

        @functools.wraps(loader)
        def load(*args: Any, **kwargs: Any) -> Any:
            values = [*args, *kwargs.values()]
            self.given.note(values)
            try:
                with self._captured(), self._calls.of(values):
                    return loader(*args, **kwargs)
            except Exception as error:
                shapes = [str(tuple(value.shape)) for value in args if isinstance(value, torch.Tensor)]
                kind = "" if isinstance(error, StreamFP8Error) else f"{type(error).__name__}: "
                raise WeightUpdateError(
                    f"{name} cannot take this tensor ({' <- '.join(shapes)}): {kind}{error}"
                ) from error

        return load

    def _explain(self, error: KeyError) -> None:
        """Explain why a model did not find a parameter: a layer only has those of its own layout.

        Raises:
            WeightUpdateError: the model was looking for scales, or similar, of another layout.
        """
        last = self.given.last or ""
        if last.rpartition(".")[2] not in PACKED:
            return
        wanted = str(error.args[0] if error.args else "")
        layer = next((each for each in self._layers.values() if each.name == wanted.rpartition(".")[0]), None)
        takes = ", ".join(name for name, _ in layer.scales.values()) if layer else ""
        raise WeightUpdateError(
            f"{last} belongs to values that are quantized in another layout than the one that is served. "
            f"{layer.name if layer else 'This layer'} takes weights in high precision"
            f"{f', or quantized as it is, with {takes}' if takes else ' only'}"
        ) from error

    def _refuse_misfits(self) -> None:
        """Refuse tensors that do not fit, which loaders silently pad, repeat and cut.

        Raises:
            WeightUpdateError: some tensors do not have the shape that the model needs.
        """
        misfits = self._calls.misfits
        for layer in self._layers.values():
            misfits = kept_misfits(layer.name, misfits, layer.placeholders)
        found = self._wanted.unmeant(misfits)
        if found:
            raise WeightUpdateError(
                f"{len(found)} tensors do not have the shape that the model needs: {shortened([*map(str, found)])}"
            )

    def _all(self) -> Iterator[tuple[str, UpdateStream | RearrangedLayer]]:
        yield from self._streams.items()
        yield from self._rearranged.items()

    @contextmanager
    def _captured(self) -> Iterator[None]:
        if getattr(self._thread, "inside", False):
            yield
            return
        self._thread.inside = True
        try:
            with self._capture():
                yield
        finally:
            self._thread.inside = False

    @contextmanager
    def _whole_quantized(self) -> Iterator[None]:
        """Quantize weights that upstream reads in high precision, when it is done with them."""
        try:
            yield
            with torch.inference_mode(mode=False), torch.no_grad():
                for name, (parameter, quantize) in self._whole.items():
                    if parameter.values is not None:
                        self._quantize_whole(name, parameter.values, quantize)
        finally:
            for parameter, _ in self._whole.values():
                if not parameter.is_partial:
                    parameter.reset()

    def _quantize_whole(self, name: str, values: torch.Tensor, quantize: Callable[[torch.Tensor], Any] | None) -> None:
        layer = name.rpartition(".")[0]
        if layer not in self._rearranged:
            self._replaced[layer] = None
        # None where upstream has computed what it serves from the weight, and deleted the layer.
        found = None if quantize is None else quantize(values)
        self._damaged += [] if found is None or found.isfinite().all() else [name]


class _Refusal:
    """The sink of a weight that cannot be replaced in place: refuses all writes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        raise WeightUpdateError(f"{self.name} was repacked for its kernel when it was loaded, and cannot be updated")


_current: ContextVar[WeightUpdate | None] = ContextVar("streamfp8_update", default=None)


def is_updating(layer: torch.nn.Module) -> bool:
    """Whether upstream's post-processing of ``layer`` runs as part of an update that quantizes the layer itself."""
    update = _current.get()
    return update is not None and layer in update


def _refuse_cast(name: str, served: torch.dtype, sent: torch.dtype) -> None:
    if served is sent or not {served, sent} & set(QUANTIZED):
        return
    if served in QUANTIZED and sent.itemsize > 1:
        raise WeightUpdateError(
            f"{name} was quantized by stock SGLang, which cannot quantize it again: these {sent} values would be cast "
            "under the old scale. Send fp8 values with their scale"
        )
    raise WeightUpdateError(f"{name} is served as {served}: {sent} values mean nothing there")


def _suffix(name: str) -> str:
    return name.rpartition(".")[2].rpartition("weight")[2]


def _put_back(bindings: Bindings | None) -> None:
    if bindings is not None:
        bindings.put_back()
