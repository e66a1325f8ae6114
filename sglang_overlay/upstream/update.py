# SPDX-License-Identifier: Apache-2.0
"""Weight updates: high-precision weights into the fp8 storage of a model that is being served.

SGLang updates a model by calling its ``load_weights`` again, once (from disk) or many times between the two ends of a
session (tensors, a process group). Requests may be answered between two calls, so:

1. ``UpdatableModel`` keeps, from the first load, each layer's placeholders and upstream's loaders: no weights.
2. ``WeightUpdate`` lives from begin to end. It gives each placeholder a stream into the storage that is being served,
   and keeps units of which only a part has come.
3. While ``load_weights`` runs, and only then, each layer is what it was before its first quantization: placeholders
   under the parameters' names, no scales (``WeightUpdate.loading``).
4. Afterwards the very same fp8 parameters are back, so whatever refers to their memory (CUDA graphs) stays valid.

A unit is replaced when all of it has come. Of a unit that came in part the old values stay, and the update ends with an
error that names it: its new scale needs the missing part in high precision, and only fp8 of that is left.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from sglang_overlay.core.capture import WriteCapture, WriteSink, storage_key
from sglang_overlay.core.errors import shortened
from sglang_overlay.core.mapped_sources import MappedSources
from sglang_overlay.core.partial_capture import PartialCapture
from sglang_overlay.core.pipeline import Pipeline
from sglang_overlay.core.pipelined_stream import PipelinedStream
from sglang_overlay.core.placeholders import set_loader, twin
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.core.whole import WholeParameter
from sglang_overlay.errors import (
    LayerNotStreamableError,
    PartialUpdateError,
    UnsupportedWriteError,
    WeightUpdateError,
)
from sglang_overlay.upstream.load import MOST_NESTED, TORCH_ATTRIBUTES, tensors_of
from sglang_overlay.upstream.snapshots import NOTED
from sglang_overlay.upstream.updatable_plan import quantize_whole

if TYPE_CHECKING:
    from sglang_overlay.core.layer import WeightLoader
    from sglang_overlay.upstream.plan import ParameterPlan
    from sglang_overlay.upstream.updatable_plan import UpdatablePlan

logger = logging.getLogger(__name__)

FUSED_BY_THE_MODEL = {
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_g_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa", "g_proj"),
}
"""Layers whose weight a model puts together itself, by the last part of their name, from these checkpoint tensors.

``load_weights`` of deepseek_v2 and its relatives (bailing_moe, glm4_moe_lite, glm5_next, kimi_k25_eagle3,
longcat_flash, dots3) waits for all of them, but only within one call: one that comes alone is dropped without a word.
"""


ALL_OLD = "All fp8 layers hold their old values."
"""What an update that has replaced nothing says of its progress."""


class UpdatableLayer:
    """What is kept of a layer's first load.

    Attributes:
        name: the layer's qualified name.
        module: the layer.
        plan: how it is quantized.
        placeholders: what upstream's loaders write to, by parameter name; without memory.
        loaders: upstream's own loaders of these.
        reads_whole: upstream needs the weights in high precision, or they could not be streamed.
    """

    def __init__(
        self, name: str, module: torch.nn.Module, plan: UpdatablePlan, placeholders: Mapping[str, torch.nn.Parameter]
    ) -> None:
        self.name = name
        self.module = module
        self.plan = plan
        self.placeholders = dict(placeholders)
        self.loaders: dict[str, WeightLoader] = {
            key: placeholder.weight_loader  # type: ignore[attr-defined]
            for key, placeholder in placeholders.items()
        }
        self.reads_whole = False
        self._before_quantization = tuple(module._parameters)

    def let_go(self) -> None:
        """Keep look-alikes in place of the placeholders, which are about to get memory, or have it already."""
        self.placeholders = {
            key: twin(placeholder, torch.empty_like(placeholder, device="meta"))
            for key, placeholder in self.placeholders.items()
        }
        self.reads_whole = True

    def seal(self) -> None:
        """Take off the placeholders what the first load has put around their loaders."""
        for key, placeholder in self.placeholders.items():
            set_loader(placeholder, self.loaders[key])

    @contextmanager
    def shown(self, wrap: Callable[[str, WeightLoader], WeightLoader]) -> Iterator[None]:
        """Make the layer what it was before its first quantization, with wrapped loaders."""
        served = self.module._parameters
        shown = {key: self.placeholders.get(key, served.get(key)) for key in self._before_quantization}
        for key, placeholder in self.placeholders.items():
            set_loader(placeholder, wrap(f"{self.name}.{key}", self.loaders[key]))
        self.module._parameters = dict(shown)
        try:
            yield
        finally:
            changed = {key: new for key, new in self.module._parameters.items() if new is not shown.get(key)}
            self.module._parameters = served
            served.update({key: new for key, new in changed.items() if key not in self.placeholders})
            self.seal()


class TensorGroups:
    """Hands tensors that only load together to upstream in one call, whichever calls of an update they come in.

    Args:
        layers: names of the model's layers.
        account: counts what is held for those to come.
    """

    def __init__(self, layers: Iterable[str], account: StagingAccount) -> None:
        self._account = account
        last = {name.rpartition(".")[2] for name in layers}
        self._parts = {part: fused for fused, parts in FUSED_BY_THE_MODEL.items() if fused in last for part in parts}
        self._held: dict[str, dict[str, torch.Tensor]] = {}

    def complete(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """``weights``, without those that wait for others of their group, and with those that do so no longer."""
        for name, tensor in weights:
            part = next((part for part in name.split(".") if part in self._parts), None)
            # A pickled file may hold anything.
            if part is None or not isinstance(tensor, torch.Tensor):
                yield name, tensor
                continue
            fused = self._parts[part]
            whole = name.replace(part, fused)
            others = self._held.setdefault(whole, {})
            self._account.add(-_bytes_of(others.pop(name, None)))
            if len(others) + 1 == len(FUSED_BY_THE_MODEL[fused]):
                del self._held[whole]
                yield from {**others, name: tensor}.items()
                self._account.add(-sum(map(_bytes_of, others.values())))
            else:
                # The sender may use the tensor's memory again.
                others[name] = tensor.clone()
                self._account.add(tensor.nbytes)

    @property
    def waiting(self) -> list[str]:
        """Names of fused weights of which a part has not come."""
        return list(self._held)


def _bytes_of(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes


class UpdatableModel:
    """All that a model's updates need to know, and the update that is open.

    Args:
        layers: the layers that were quantized here.
        stock: why others went through stock's quantization, by name.

    Attributes:
        open: the update that is open.
        unopened: why the session that is under way has none, where that went wrong; told at its end.
    """

    def __init__(self, layers: Iterable[UpdatableLayer], stock: Mapping[str, str]) -> None:
        self.layers = list(layers)
        self.open: WeightUpdate | None = None
        self.unopened: Exception | None = None
        known = {layer.name for layer in self.layers}
        self._stock = {name: reason for name, reason in stock.items() if name not in known}

    def begin(self, workers: int = 0) -> WeightUpdate:
        """Open an update, in place of one that was never ended."""
        self.abort()
        if self._stock:
            logger.warning(
                "StreamFP8: stock SGLang quantized %s, and cannot update fp8 layers that it quantized: %s",
                "these layers" if self.layers else "this model",
                shortened([f"{name} ({reason})" for name, reason in self._stock.items()]),
            )
            self._stock = {}
        self.open = WeightUpdate(self.layers, workers)
        return self.open

    def end(self) -> None:
        """Close the open update.

        Raises:
            WeightUpdateError: some units came only in part.
        """
        update, self.open = self.open, None
        if update is not None:
            try:
                update.finish()
            finally:
                update.close()

    def abort(self) -> None:
        """Close the open update, if any, and forget what has not been completed."""
        update, self.open = self.open, None
        if update is not None:
            update.close()


class WeightUpdate:
    """One update, from begin to end. Belongs to the thread that updates; loader threads reach only the sinks.

    Args:
        layers: of the model.
        workers: threads that quantize beside the loader, where the source allows it.
    """

    def __init__(self, layers: Iterable[UpdatableLayer], workers: int = 0) -> None:
        self.sources = MappedSources()
        self.account = StagingAccount()
        self._pipeline = Pipeline(workers)
        self._layers = {layer.module: layer for layer in layers}
        self._streams: dict[str, PipelinedStream] = {}
        self._whole: dict[str, tuple[WholeParameter, ParameterPlan]] = {}
        self._sinks: dict[int, WriteSink] = {}
        self._replaced: dict[str, None] = {}
        self._damaged: list[str] = []
        self._groups = TensorGroups((layer.name for layer in self._layers.values()), self.account)
        self._thread = threading.local()
        try:
            with torch.inference_mode(mode=False):
                for layer in self._layers.values():
                    self._open(layer)
        except BaseException:
            self.close()
            raise
        self._names = {sink.name for sink in self._sinks.values()}

    def __contains__(self, module: torch.nn.Module) -> bool:
        return module in self._layers

    def takes(self, name: str) -> bool:
        """Whether a parameter of this name is quantized by this update, or refused."""
        return name in self._names

    @contextmanager
    def loading(self, model: torch.nn.Module) -> Iterator[None]:
        """Around a call of ``load_weights``, with whatever upstream does before and after it.

        Raises:
            WeightUpdateError: a layer cannot take what upstream's loader does, or upstream has left the model tensors
                that cannot be served.
        """
        derived = _TensorAttributes(model)
        token = _current.set(self)
        self._thread.inside = True
        try:
            with (
                _all_shown(self._layers.values(), self._wrap),
                _given(model, self._groups.complete),
                _notes_kept(model),
                self._whole_quantized(),
                PartialCapture(self._sinks),
            ):
                yield
        except UnsupportedWriteError as error:
            raise WeightUpdateError(str(error)) from error
        finally:
            self._thread.inside = False
            _current.reset(token)
            changed = derived.keep_memory()
        if changed:
            raise WeightUpdateError(
                "upstream made these tensors anew in another form, so they keep their old memory and values: "
                f"{shortened(changed)}. Load the new weights by starting the server with them"
            )
        leaks = [name for name, tensor in tensors_of(model) if tensor.is_meta] if self._layers else []
        if leaks:
            raise WeightUpdateError(
                "computed from a weight that is quantized while it is read, these tensors hold no data: "
                f"{shortened(leaks)}. Load the new weights by starting the server with them"
            )

    def finish(self) -> None:
        """Quantize what was only waiting for the end.

        Raises:
            PartialUpdateError: some units came only in part.
            WeightUpdateError: weights came that do not go together.
        """
        self._pipeline.close()
        self._pipeline.check()
        partial = {name: len(units) for name, stream in self._streams.items() if (units := stream.partial_units)}
        conflicts = [error for stream in self._streams.values() if (error := _settled(stream))]
        problems = [f"{name} ({units} of {self._streams[name].units} units)" for name, units in partial.items()]
        problems += [name for name, (parameter, _) in self._whole.items() if parameter.is_partial]
        problems += self._groups.waiting
        if problems:
            raise PartialUpdateError(
                f"the update ended with weights of which only a part came: {shortened(problems)}. They keep their old "
                "values. One scale covers a whole unit, so send what belongs together in one update: gate_proj with "
                "up_proj, q_proj with k_proj and v_proj, q_a_proj with kv_a_proj_with_mqa"
            )
        if conflicts:
            raise WeightUpdateError(str(conflicts[0])) from conflicts[0]
        self._damaged += [name for name, stream in self._streams.items() if stream.done_units and stream.not_finite()]
        if self._damaged:
            logger.warning(
                "StreamFP8: the weight update put NaN or Inf into %d parameters: %s. Expect garbage.",
                len(self._damaged),
                shortened(self._damaged),
            )
        logger.info(
            "StreamFP8: weight update: %d units of %d layers quantized in place, at most %.1f MB staged.",
            sum(stream.done_units for stream in self._streams.values()),
            len(self.replaced),
            self.account.peak / 1e6,
        )

    def close(self) -> None:
        """End what runs beside the update and give all staging memory back. May be called again."""
        self._pipeline.close()
        for stream in self._streams.values():
            stream.release()
        for parameter, _ in self._whole.values():
            parameter.reset()

    @property
    def replaced(self) -> list[str]:
        """Names of the fp8 layers that hold new values, at least in part."""
        names = dict.fromkeys(name.rpartition(".")[0] for name, stream in self._streams.items() if stream.done_units)
        return [*names, *self._replaced]

    @property
    def progress(self) -> str:
        """A sentence for error messages: which layers hold new values."""
        names = self.replaced
        if not names:
            return ALL_OLD
        return f"These fp8 layers hold new values, all others their old ones: {shortened(names)}."

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _open(self, layer: UpdatableLayer) -> None:
        storages = layer.plan.registered(layer.module, layer.placeholders)
        for key, placeholder in layer.placeholders.items():
            name = f"{layer.name}.{key}"
            if storages is None:
                self._sinks[storage_key(placeholder)] = _Refusal(name)
                continue
            plan = layer.plan.parameter(key, placeholder, storages[key])
            self._sinks[storage_key(placeholder)] = (
                self._whole_sink(name, placeholder, plan)
                if layer.reads_whole
                else self._stream(name, placeholder, plan)
            )

    def _whole_sink(self, name: str, placeholder: torch.nn.Parameter, plan: ParameterPlan) -> WriteSink:
        sink = WholeParameter(name, placeholder, plan.storage.weight.device)
        self._whole[name] = (sink, plan)
        return sink

    def _stream(self, name: str, placeholder: torch.nn.Parameter, plan: ParameterPlan) -> WriteSink:
        self._streams[name] = PipelinedStream(
            name,
            placeholder,
            plan.grid,
            plan.quantizer,
            plan.storage,
            self.account,
            self.sources,
            quantized=_ignore,
            pipeline=self._pipeline,
        )
        return self._streams[name]

    def _wrap(self, name: str, loader: WeightLoader) -> WeightLoader:
        """Upstream's loader of a weight, captured where it runs in a thread of its own; its errors name the weight."""

        @functools.wraps(loader)
        def load(*args: Any, **kwargs: Any) -> Any:
            try:
                with self._captured():
                    return loader(*args, **kwargs)
            except Exception as error:
                shapes = [str(tuple(value.shape)) for value in args if isinstance(value, torch.Tensor)]
                raise WeightUpdateError(
                    f"{name} cannot take this tensor ({' <- '.join(shapes)}): {type(error).__name__}: {error}"
                ) from error

        return load

    @contextmanager
    def _captured(self) -> Iterator[None]:
        if getattr(self._thread, "inside", False):
            yield
            return
        self._thread.inside = True
        try:
            with WriteCapture(self._sinks):
                yield
        finally:
            self._thread.inside = False

    @contextmanager
    def _whole_quantized(self) -> Iterator[None]:
        """Quantize, when upstream is done with them, weights that it reads in high precision."""
        try:
            yield
            with torch.inference_mode(mode=False), torch.no_grad():
                for name, (parameter, plan) in self._whole.items():
                    if parameter.values is not None:
                        self._quantize_whole(name, parameter.values, plan)
        finally:
            for parameter, _ in self._whole.values():
                if not parameter.is_partial:
                    parameter.reset()

    def _quantize_whole(self, name: str, values: torch.Tensor, plan: ParameterPlan) -> None:
        found = quantize_whole(plan, values)
        self._damaged += [] if found.isfinite().all() else [name]
        self._replaced[name.rpartition(".")[0]] = None


class _Refusal:
    """Stands for a weight that cannot be replaced in place."""

    def __init__(self, name: str) -> None:
        self.name = name

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        raise WeightUpdateError(f"{self.name} was repacked for its kernel when it was loaded, and cannot be updated")


class _TensorAttributes:
    """Tensors that modules hold as attributes, such as MLA's ``w_kc``, or in lists and dicts; no parameters or buffers.

    By name, since upstream may make the lists and dicts anew as well.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._found = {name: tensor for name, _, _, tensor in _slots(model) if not tensor.is_meta}

    def keep_memory(self) -> list[str]:
        """Where upstream has put a new tensor in place of one, move its values into the old one's memory.

        Returns:
            Names of those that have got another form; they keep their old values too.
        """
        changed = []
        for name, holder, key, new in _slots(self._model):
            old = self._found.get(name, new)
            if new is old:
                continue
            holder[key] = old
            # Without data: computed from a weight that did not come in this update, and so has not changed.
            if new.is_meta:
                continue
            if (new.shape, new.dtype) != (old.shape, old.dtype):
                changed.append(name)
                continue
            with torch.no_grad():
                old.copy_(new)
        return changed


def _slots(model: torch.nn.Module) -> Iterator[tuple[str, Any, Any, torch.Tensor]]:
    """Where modules hold tensors beside parameters and buffers: name, list or dict, index or key, and the tensor."""
    for prefix, module in model.named_modules():
        attributes = vars(module)
        for key in [key for key in attributes if key not in TORCH_ATTRIBUTES]:
            yield from _slots_at(attributes, key, f"{prefix}.{key}" if prefix else key, MOST_NESTED)


def _slots_at(holder: Any, key: Any, name: str, depth: int) -> Iterator[tuple[str, Any, Any, torch.Tensor]]:
    value = holder[key]
    if isinstance(value, torch.Tensor):
        yield name, holder, key, value
    elif isinstance(value, (list, dict)) and depth:
        for inner in list(value) if isinstance(value, dict) else range(len(value)):
            yield from _slots_at(value, inner, f"{name}[{inner!r}]", depth - 1)


_current: ContextVar[WeightUpdate | None] = ContextVar("streamfp8_update", default=None)
_models: weakref.WeakKeyDictionary[torch.nn.Module, UpdatableModel] = weakref.WeakKeyDictionary()


def is_updating(layer: torch.nn.Module) -> bool:
    """Whether upstream's post-processing of ``layer`` runs as part of an update that quantizes the layer itself."""
    update = _current.get()
    return update is not None and layer in update


def remember(model: torch.nn.Module, updatable: UpdatableModel) -> None:
    """Keep what ``model``'s updates need for as long as the model lives."""
    _models[model] = updatable


def updatable(model: torch.nn.Module) -> UpdatableModel | None:
    """What was remembered for ``model``."""
    return _models.get(model)


@contextmanager
def _all_shown(layers: Iterable[UpdatableLayer], wrap: Callable[[str, WeightLoader], WeightLoader]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.shown(wrap))
        yield


@contextmanager
def _notes_kept(model: torch.nn.Module) -> Iterator[None]:
    """Have models forget what they note down meanwhile: placeholders, in place of the parameters that are served."""
    before = {
        module: {name: vars(module)[name] for name in NOTED if name in vars(module)} for module in model.modules()
    }
    try:
        yield
    finally:
        for module, noted in before.items():
            for name in NOTED:
                vars(module).pop(name, None)
            vars(module).update(noted)


@contextmanager
def _given(model: torch.nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Make ``model.load_weights`` load what ``change`` makes of the weights."""
    attributes: dict[str, Any] = vars(model)
    own, original = attributes.get("load_weights"), model.load_weights

    @functools.wraps(original)  # type: ignore[arg-type]
    def load_weights(weights: Any, *args: Any, **kwargs: Any) -> Any:
        return original(change(weights), *args, **kwargs)  # type: ignore[operator]

    attributes["load_weights"] = load_weights
    try:
        yield
    finally:
        del attributes["load_weights"]
        if own is not None:
            attributes["load_weights"] = own


def _settled(stream: PipelinedStream) -> LayerNotStreamableError | None:
    try:
        stream.settle()
    except LayerNotStreamableError as error:
        return error
    return None


def _ignore(_size: int) -> None:
    """Nobody watches the progress of an update."""
