# SPDX-License-Identifier: Apache-2.0
"""One streamed parameter: takes writes, stages incomplete units, quantizes complete ones into the fp8 storage."""

from __future__ import annotations

import enum
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from sglang_overlay.core.quantizers import UnitQuantizer
from sglang_overlay.core.regions import Box, Placement, extent, slices, volume
from sglang_overlay.core.staging import Piece, StagedUnit, StagingAccount
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.errors import LayerNotStreamableError


class UnitState(enum.IntEnum):
    """Where a unit is between its first write and its fp8 values."""

    EMPTY = 0
    STAGED = 1
    DONE = 2


@dataclass(frozen=True)
class Storage:
    """Final memory of a parameter.

    Attributes:
        weight: fp8, ``(units, *unit shape)``.
        scale: float32, first dimension ``units``.
    """

    weight: torch.Tensor
    scale: torch.Tensor


class ParameterStream:
    """Quantizes one parameter unit by unit while it is written.

    Any thread may write. ``_condition`` guards ``_busy``. A unit in there belongs to the thread that put it there, with its
    state and staging; that thread copies and quantizes without holding the lock, so different units of a parameter are
    quantized at the same time.

    Args:
        name: for messages, for example ``model.layers.3.mlp.experts.w13_weight``.
        placeholder: the meta parameter that upstream's loader writes to.
        grid: how the parameter divides into units.
        quantizer: turns a complete unit into fp8.
        storage: where the results go; its device is where staging lies.
        account: counts staging memory.
        quantized: called with the bytes of fp8 written, each time units are done; from any thread.
    """

    def __init__(
        self,
        name: str,
        placeholder: torch.Tensor,
        grid: UnitGrid,
        quantizer: UnitQuantizer,
        storage: Storage,
        account: StagingAccount,
        quantized: Callable[[int], None],
    ) -> None:
        self.name = name
        self.storage = storage
        self.units = grid.count
        self._shape = placeholder.shape
        self._dtype = placeholder.dtype
        self._grid = grid
        self._quantizer = quantizer
        self._account = account
        self._quantized = quantized
        self._condition = threading.Condition()
        self._states = bytearray(grid.count)
        self._direct = bytearray(grid.count)
        self._staged: dict[int, StagedUnit] = {}
        self._busy: set[int] = set()

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Take a write of ``source`` to the view ``destination`` of the placeholder. Shapes are equal.

        Raises:
            UnsupportedWriteError: the view is no box of the parameter.
        """
        if not destination.numel():
            return
        placement = Placement(destination, self._shape)
        values = placement.lay_out(source)
        (first, last), box = self._grid.divide(placement.box)
        if not self._grid.sliced:
            values = values.unsqueeze(0)
        if box == self._grid.full:
            self._write_whole(first, last, values)
            return
        for unit in range(first, last):
            self._write_part(unit, box, values[unit - first])

    def incomplete(self) -> list[int]:
        """Units that are not completely written, in order."""
        return [unit for unit, state in enumerate(self._states) if state != UnitState.DONE]

    @property
    def direct_units(self) -> int:
        """Units that came whole in one write, at least once, and needed no staging."""
        return sum(self._direct)

    def untouched(self) -> bool:
        """Whether nothing was ever written."""
        return not any(self._states)

    def restore(self) -> torch.Tensor:
        """Everything written so far, in high precision on the storage's device, as stock would hold it. Ends streaming.

        Raises:
            LayerNotStreamableError: some units have been quantized, and their high-precision values are gone.
        """
        if UnitState.DONE in self._states:
            raise LayerNotStreamableError(
                f"{self.name}: {self._states.count(UnitState.DONE)} units are quantized already"
            )
        weight = torch.empty(self._shape, dtype=self._dtype, device=self.storage.weight.device)
        units = weight if self._grid.sliced else weight.unsqueeze(0)
        for unit, staged in self._staged.items():
            for piece in staged.pieces:
                units[unit][slices(piece.box)].copy_(piece.values)
        self.release()
        return weight

    def release(self) -> None:
        """Give all staging memory back."""
        for staged in self._staged.values():
            staged.release()
        self._staged.clear()

    def _write_whole(self, first: int, last: int, values: torch.Tensor) -> None:
        with self._owned(range(first, last)):
            for unit in range(first, last):
                self._drop(unit)
            self._quantizer.quantize_run(
                self._on_device(values), self.storage.weight[first:last], self.storage.scale[first:last]
            )
            self._states[first:last] = bytes([UnitState.DONE]) * (last - first)
            self._direct[first:last] = bytes([1]) * (last - first)
        self._count(first, last)

    def _write_part(self, unit: int, box: Box, values: torch.Tensor) -> None:
        with self._owned((unit,)):
            staged = self._staged.setdefault(unit, StagedUnit(self._account))
            staged.overwrite(box)
            if staged.covered + volume(box) < self._grid.unit_volume:
                self._states[unit] = UnitState.STAGED
                staged.hold(Piece(box, self._copy(box, values)))
                return
            pieces = [*staged.pieces, Piece(box, self._on_device(values))]
            self._quantizer.quantize(pieces, self.storage.weight[unit], self.storage.scale[unit])
            self._drop(unit)
            self._states[unit] = UnitState.DONE
        self._count(unit, unit + 1)

    def _count(self, first: int, last: int) -> None:
        self._quantized((last - first) * self._grid.unit_volume * self.storage.weight.element_size())

    def _drop(self, unit: int) -> None:
        staged = self._staged.pop(unit, None)
        if staged is not None:
            staged.release()

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        # Stock casts to the parameter's dtype first and quantizes that; a float32 checkpoint must do the same.
        return values.to(device=self.storage.weight.device, dtype=self._dtype)

    def _copy(self, box: Box, values: torch.Tensor) -> torch.Tensor:
        # A loader may reuse the source's memory once it returns, so what is kept is always a copy.
        held = torch.empty(extent(box), dtype=self._dtype, device=self.storage.weight.device)
        return held.copy_(values)

    @contextmanager
    def _owned(self, units: Iterable[int]) -> Iterator[None]:
        wanted = set(units)
        with self._condition:
            self._condition.wait_for(lambda: self._busy.isdisjoint(wanted))
            self._busy |= wanted
        try:
            yield
        finally:
            with self._condition:
                self._busy -= wanted
                self._condition.notify_all()
