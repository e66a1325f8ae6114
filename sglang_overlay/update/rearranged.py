# SPDX-License-Identifier: Apache-2.0
"""Update layers that upstream has rearranged for their kernel, in the same memory.

Marlin's tiles, scales packed or shuffled for Blackwell, and aiter's shuffles of blocks take no rows of new weights. But
they are a function of all of them:

1. New weights are quantized into fresh memory, in the layout that upstream rearranged when it loaded the layer.
2. As soon as all of them have come, upstream rearranges a copy of the layer with these weights.
3. The result is copied to where the served layer's tensors lie, and the fresh memory is released.

So such a layer takes device memory of its own size while it is incomplete, and for a moment twice that; and all of it
has to come in one update.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sglang_overlay.core.capture import WriteSink
from sglang_overlay.core.full_precision import FullPrecisionParameter
from sglang_overlay.core.messages import shortened
from sglang_overlay.core.placeholders import twin
from sglang_overlay.core.quantizer import made_current
from sglang_overlay.core.quantizers import units_not_finite
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.core.stream import Storage
from sglang_overlay.errors import WeightUpdateError
from sglang_overlay.load.updatable_layer import UpdatableLayer
from sglang_overlay.schemes.layer_plan import LayerPlan
from sglang_overlay.update.ready_values import ReadyValues
from sglang_overlay.update.tensor_attributes import slots
from sglang_overlay.update.undo import UndoLog
from sglang_overlay.update.update_stream import UpdateStream

Streamed = tuple[UpdateStream, "ReadyValues | None"]
"""What takes a weight, and its values and scales that are quantized already."""


class _CallLog(UndoLog):
    """Keeps nothing until a call begins: what began in a call that is undone is dropped as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self._is_open = False

    def begin(self) -> None:
        self.forget()
        self._is_open = True

    def keep(self, *views: torch.Tensor) -> None:
        if self._is_open:
            super().keep(*views)


@dataclass(frozen=True, eq=False)
class _Collected:
    """New weights of a layer, in the layout in which it was loaded.

    Attributes:
        plan: by which they are quantized.
        storages: where to, by parameter name.
        streams: what takes each weight.
        companions: what takes everything that is loaded beside them.
        log: keeps what a call overwrites of them.
    """

    plan: LayerPlan
    storages: Mapping[str, Storage]
    streams: Mapping[str, Streamed]
    companions: Mapping[str, FullPrecisionParameter]
    log: _CallLog

    def stream(self, key: str) -> WriteSink:
        return self.streams[key][0]

    def ready(self, key: str) -> WriteSink:
        ready = self.streams[key][1]
        assert ready is not None
        return ready

    def companion(self, key: str) -> WriteSink:
        return self.companions[key]

    @property
    def size(self) -> int:
        return sum(storage.weight.nbytes + storage.scale.nbytes for storage in self.storages.values())

    @property
    def is_complete(self) -> bool:
        return all(stream.is_replaced for stream, _ in self.streams.values()) and all(
            companion.values is not None for companion in self.companions.values()
        )

    @property
    def missing(self) -> Iterator[str]:
        """What has not come, for messages. To be called while no loader runs."""
        for stream, _ in self.streams.values():
            covered = stream.replaced_units + stream.covered_units
            if stream.problem is not None:
                yield stream.problem
            elif covered < stream.units:
                yield f"{stream.name} ({covered} of {stream.units} units)"
        yield from (companion.name for companion in self.companions.values() if companion.values is None)

    def saved(self) -> tuple[Any, ...]:
        self.log.begin()
        return (
            {key: stream.saved() for key, (stream, _) in self.streams.items()},
            {key: companion.saved() for key, companion in self.companions.items()},
        )

    def restore(self, saved: tuple[Any, ...]) -> None:
        self.log.undo()
        streams, companions = saved
        for key, (stream, _) in self.streams.items():
            stream.restore_call(streams[key])
        for key, companion in self.companions.items():
            companion.restore(companions[key])

    def drop(self) -> None:
        for stream, _ in self.streams.values():
            stream.drop_staged()


class RearrangedLayer:
    """Collects new weights of a layer that upstream has rearranged; has upstream rearrange them, once all have come.

    Any thread may write; ``_lock`` guards which weights are being collected, and is held while they are rearranged.
    Everything else may be called only while no loader runs.

    Args:
        layer: the layer, as it is served.
        stream: makes what takes one of its weights: of this name, by this plan, into this storage.
        undo: keeps what is overwritten.
        account: counts the fresh memory.

    Attributes:
        device: where it is.
        replaced_units: number of units that hold new values.
        has_narrowed_rows: whether some values came without the rest of their rows.
    """

    def __init__(
        self,
        layer: UpdatableLayer,
        stream: Callable[[str, LayerPlan, Storage, UndoLog], Streamed],
        undo: UndoLog,
        account: StagingAccount,
    ) -> None:
        self.name = layer.name
        self.replaced_units = 0
        self.has_narrowed_rows = False
        self._layer = layer
        self._stream = stream
        self._undo = undo
        self._account = account
        self._served = dict(layer.module._parameters)
        self.device = next(weight.device for weight in self._served.values() if weight is not None)
        self._lock = threading.Lock()
        self._collected: _Collected | None = None
        self._magnitudes: list[tuple[str, torch.Tensor]] = []

    def sinks(self) -> Iterator[tuple[torch.nn.Parameter, WriteSink]]:
        """The placeholders of the layer, each with what takes the writes to it."""
        for key, placeholder in self._layer.placeholders.items():
            yield placeholder, _Sink(f"{self.name}.{key}", self, partial(_Collected.stream, key=key))
        for key, (name, placeholder) in self._layer.scales.items():
            yield placeholder, _Sink(f"{self.name}.{name}", self, partial(_Collected.ready, key=key))
        for key, placeholder in self._layer.companions.items():
            yield placeholder, _Sink(f"{self.name}.{key}", self, partial(_Collected.companion, key=key))

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters that have to be sent."""
        return [f"{self.name}.{key}" for key in (*self._layer.placeholders, *self._layer.companions)]

    @property
    def units(self) -> int:
        """Number of units."""
        plan, meta = self._layer.plan.again(), torch.device("meta")
        weights = self._layer.placeholders.items()
        return sum(plan.parameter(key, weight, plan.allocate(key, weight, meta)).grid.count for key, weight in weights)

    @property
    def served_dtypes(self) -> Iterator[tuple[torch.nn.Parameter, torch.dtype]]:
        """Each weight's placeholder, with the dtype into which it is quantized."""
        plan = self._layer.plan.again()
        for key, placeholder in self._layer.placeholders.items():
            yield placeholder, plan.allocate(key, placeholder, torch.device("meta")).weight.dtype

    def write(self, sink: Callable[[_Collected], WriteSink], destination: torch.Tensor, source: torch.Tensor) -> None:
        """Have one of what is being collected take a write; rearrange the layer if it is complete now."""
        with self._lock:
            if self._collected is None:
                self._hold(self._begin())
            collected = self._collected
            assert collected is not None
        sink(collected).write(destination, source)
        with self._lock:
            if self._collected is collected and collected.is_complete:
                self._rearrange(collected)

    def write_all(self, key: str, values: torch.Tensor) -> None:
        """Take all of a weight at once."""
        placeholder = self._layer.placeholders[key]
        self.write(partial(_Collected.stream, key=key), torch.empty_like(placeholder, device="meta"), values)

    @property
    def missing(self) -> list[str]:
        """What has not come of a layer of which some has. To be called while no loader runs."""
        return [] if self._collected is None else list(self._collected.missing)

    def copy_lent(self) -> None:
        """Copy pieces that wait in memory which is about to be taken back; rearrange what jobs have completed since."""
        collected = self._collected
        if collected is None:
            return
        for stream, _ in collected.streams.values():
            stream.copy_lent()
        if collected.is_complete:
            self._rearrange(collected)

    def finish(self) -> None:
        """Rearrange the layer if units of it had to wait for the end. Nothing may be missing."""
        if self._collected is not None:
            self._rearrange(self._collected)

    @property
    def is_incomplete(self) -> bool:
        """Whether some of the layer has come that is not served yet."""
        return self._collected is not None

    @property
    def damaged(self) -> list[str]:
        """Names of the weights that now hold NaN or Inf. Waits for the device."""
        return [name for name, found in self._magnitudes if units_not_finite([found])[0]]

    def saved(self) -> tuple[Any, ...]:
        """A snapshot for ``restore``."""
        collected = self._collected
        return collected, None if collected is None else collected.saved(), self.replaced_units, list(self._magnitudes)

    def restore(self, saved: tuple[Any, ...]) -> None:
        """Go back to the state at the time of ``saved``."""
        collected, before, self.replaced_units, self._magnitudes = saved
        if self._collected is not collected:
            self.drop()
        self._hold(collected)
        if collected is not None:
            collected.restore(before)

    def drop(self) -> None:
        """Let go of incomplete weights."""
        if self._collected is not None:
            self._collected.drop()
        self._hold(None)

    def _hold(self, collected: _Collected | None) -> None:
        sizes = [0 if each is None else each.size for each in (self._collected, collected)]
        self._account.add(sizes[1] - sizes[0])
        self._collected = collected

    def _begin(self) -> _Collected:
        plan, log = self._layer.plan.again(), _CallLog()
        with torch.inference_mode(mode=False):
            storages = {
                key: plan.allocate(key, placeholder, self.device)
                for key, placeholder in self._layer.placeholders.items()
            }
            streams = {key: self._stream(key, plan, storage, log) for key, storage in storages.items()}
            # With placeholders of their own: those that models know stay without memory.
            companions = {
                key: FullPrecisionParameter(
                    f"{self.name}.{key}", twin(like, torch.empty_like(like, device="meta")), self.device
                )
                for key, like in self._layer.companions.items()
            }
        return _Collected(plan, storages, streams, companions, log)

    def _rearrange(self, collected: _Collected) -> None:
        for stream, _ in collected.streams.values():
            conflict = stream.conflict
            if conflict is not None:
                raise WeightUpdateError(str(conflict)) from conflict
        for storage in collected.storages.values():
            collected.log.keep(storage.weight, storage.scale)
        with torch.inference_mode(mode=False), torch.no_grad(), made_current(self.device):
            copied = self._layer.as_loaded(self._served)
            for key, companion in collected.companions.items():
                like, values = self._layer.companions[key], companion.values
                assert values is not None
                copied._parameters[key] = twin(like, values.clone())
            plan = collected.plan.again()
            plan.register(copied, collected.storages)
            self._layer.process(plan, copied)
            changed = self._take_over(copied)
        if changed:
            raise WeightUpdateError(
                f"upstream has made these tensors of {self.name} in another form than when it was loaded: "
                f"{shortened(changed)}. Load the new weights by starting the server with them"
            )
        self._hold(None)
        streams = [stream for stream, _ in collected.streams.values()]
        self.replaced_units = sum(stream.units for stream in streams)
        self.has_narrowed_rows |= any(stream.has_narrowed_rows for stream in streams)
        self._magnitudes += [(stream.name, stream.magnitudes) for stream in streams]

    def _take_over(self, copied: torch.nn.Module) -> list[str]:
        """Copy a rearranged copy's tensors into those that are served; returns names of those that do not fit."""
        module = self._layer.module
        made = {**copied._parameters, **copied._buffers, **{name: tensor for name, _, _, tensor in slots(copied)}}
        served = {**self._served, **module._buffers, **{name: tensor for name, _, _, tensor in slots(module)}}
        changed, pairs = [], []
        for name in made.keys() | served.keys():
            new, old = made.get(name), served.get(name)
            if new is old:
                continue
            if new is None or old is None or (new.shape, new.dtype) != (old.shape, old.dtype) or _holds_tensors(new):
                changed.append(name)
            else:
                pairs.append((old.data, new.data))
        for old, new in [] if changed else pairs:
            self._undo.keep(old)
            old.copy_(new)
        return sorted(changed)


class _Sink:
    """Takes the writes to a placeholder of a rearranged layer."""

    def __init__(self, name: str, layer: RearrangedLayer, sink: Callable[[_Collected], WriteSink]) -> None:
        self.name = name
        self._layer = layer
        self._sink = sink

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        self._layer.write(self._sink, destination, source)


def _holds_tensors(tensor: torch.Tensor) -> bool:
    return any(isinstance(value, torch.Tensor) for value in vars(tensor).values())
