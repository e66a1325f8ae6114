# SPDX-License-Identifier: Apache-2.0
"""Layer-granular streaming, for comparison: collect a whole layer in high precision, quantize it, release it.

vLLM #31914 and SGLang #17945 write to a layer's memory from its first tensor on. vLLM 0.33 keeps the arguments of its
weight loaders (``model_loader/reload/layerwise.py``), and makes the layer when it has all. Here both are modes of this
package's own streaming, so that comparisons show only the granularity: capture, kernels, threads and reports are the
same. For plans and benchmarks (``ci/bench``) only, never for serving.

    with whole_layers(): load()

A layer's peak lasts only while its last values are quantized, some milliseconds. ``peak_seconds`` prolongs it for
measurements that sample memory.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from sglang_overlay.core.checkpoint_stream import CheckpointStream
from sglang_overlay.core.regions import Box, Placement, difference, slices, whole
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.load import model_load
from sglang_overlay.offline.plan.replacing import replaced

if TYPE_CHECKING:
    from collections.abc import Iterator

_PART_BYTES = 1 << 18
"""Size of a job when a layer is quantized at once on a CPU, so that worker threads share it."""


class _Layer:
    """The parameters of one layer; ``lock`` guards collecting them. Complete when each is completely written.

    ``making`` is held while a layer is made of what waited, if not None: of all layers, one at a time.
    """

    def __init__(self, peak_seconds: float, making: threading.Lock | None) -> None:
        self.peak_seconds = peak_seconds
        self.making = making
        self.lock = threading.Lock()
        self.members: list[GatheredStream] = []


class GatheredStream(CheckpointStream):
    """A parameter that waits for the rest of its layer.

    Args:
        layer: to which it belongs.
        placeholder, arguments, options: as of ``CheckpointStream``.
    """

    def __init__(self, layer: _Layer, name: str, placeholder: torch.Tensor, *arguments: Any, **options: Any) -> None:
        super().__init__(name, placeholder, *arguments, **options)
        self._placeholder = placeholder
        self._layer = layer
        self._arguments: list[tuple[Placement, torch.Tensor]] = []
        self._gathered: torch.Tensor | None = None
        self._missing: list[Box] = [whole(self._shape)]
        self._is_passed_on = False
        layer.members.append(self)

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        if not destination.numel():
            return
        with self._layer.lock:
            if self._is_passed_on:
                super().write(destination, source)
                return
            placement = Placement(destination, self._shape)
            self._arguments.append((placement, source))
            self._missing = [part for box in self._missing for part in difference(box, placement.box)]
            if self._layer.making is None:
                self._gather()
            if not any(member._missing for member in self._layer.members):
                with self._layer.making or contextlib.nullcontext():
                    for member in self._layer.members:
                        member._gather()
                    for member in self._layer.members:
                        member._pass_on()

    def restore(self) -> torch.Tensor:
        self._gather()
        if self._gathered is None:
            return super().restore()
        gathered = self._gathered
        self._let_go()
        return gathered.view(self._placeholder_shape)

    def drop_staged(self) -> None:
        self._let_go()
        super().drop_staged()

    def _gather(self) -> None:
        """Copy what was written into high-precision memory, made at the first call that finds something."""
        if self._gathered is None and self._arguments:
            self._gathered = torch.empty(self._shape, dtype=self._dtype, device=self.storage.weight.device)
            self._account.add(self._gathered.nbytes)
        for placement, source in self._arguments:
            assert self._gathered is not None
            self._gathered[slices(placement.box)].copy_(placement.lay_out(source))
        self._arguments.clear()

    def _pass_on(self) -> None:
        """Quantize everything, on a CPU on all threads like stock's operators, and wait: jobs read this memory."""
        gathered = self._gathered
        assert gathered is not None
        self._is_passed_on = True
        self.sources.offer(gathered)
        shared = self._grid.sliced and gathered.device.type == "cpu"
        parts = min(self.units, max(1, gathered.nbytes // _PART_BYTES)) if shared else 1
        placeholder = self._placeholder.detach().view(self._shape)
        for place, values in zip(placeholder.chunk(parts), gathered.chunk(parts), strict=True):
            super().write(place, values)
        self._wait()
        time.sleep(self._layer.peak_seconds)
        self._let_go()

    def _let_go(self) -> None:
        self._arguments.clear()
        if self._gathered is not None:
            self._account.add(-self._gathered.nbytes)
            self._gathered = None


@contextlib.contextmanager
def whole_layers(peak_seconds: float = 0.0, *, when_complete: bool = False) -> Iterator[None]:
    """Make loads in this process collect layers: all parameters whose names differ only in the last part.

    Args:
        peak_seconds: by which each layer's peak is prolonged.
        when_complete: keep what is written as it comes, and make a layer's memory when it has all, one layer at a time,
            since vLLM loads in one thread; else with the first.
    """
    layers: dict[tuple[StagingAccount, str], _Layer] = {}
    making = threading.Lock() if when_complete else None

    def stream(name: str, *arguments: Any, **options: Any) -> GatheredStream:
        # One load has one account.
        account = next(value for value in arguments if isinstance(value, StagingAccount))
        layer = layers.setdefault((account, name.rpartition(".")[0]), _Layer(peak_seconds, making))
        return GatheredStream(layer, name, *arguments, **options)

    with replaced(model_load, "CheckpointStream", stream):
        yield
