# SPDX-License-Identifier: Apache-2.0
"""One streamed parameter: takes writes, stages incomplete units, quantizes complete ones into the fp8 storage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch

from sglang_overlay.core.errors import (
    ConflictingWriteError,
    UnsupportedDtypeError,
    UnsupportedWriteError,
)
from sglang_overlay.core.quantizer import Quantizer, made_current
from sglang_overlay.core.regions import slices
from sglang_overlay.core.staging import Piece, StagedUnit, StagingAccount
from sglang_overlay.core.units import TargetRegion, TargetRegions, UnitGrid

MOST_AT_ONCE = 1 << 27
"""Elements that are put on the device and quantized in one go, but at least a unit."""


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

    Any thread may write. ``_lock`` guards ``_busy``, the claimed units, and ``_waiting``, the number of waiters. A busy
    unit, with its state and staging, belongs to the thread that claimed it.
    Copying and quantizing happen without the lock, so different units are quantized concurrently.

    Args:
        name: for messages, for example ``model.layers.3.mlp.experts.w13_weight``.
        placeholder: the meta parameter that upstream's loader writes to.
        grid: how the parameter divides into units.
        quantizer: turns a complete unit into fp8.
        storage: where the results go. Staged pieces stay on the device they came from: device memory is scarce.
        account: counts staging memory.
    """

    def __init__(
        self,
        name: str,
        placeholder: torch.Tensor,
        grid: UnitGrid,
        quantizer: Quantizer,
        storage: Storage,
        account: StagingAccount,
    ) -> None:
        self.name = name
        self.storage = storage
        self.units = grid.count
        self._shape = torch.Size(grid.parameter_shape)
        self._regions = TargetRegions(grid)
        self._placeholder_shape = placeholder.shape
        self._dtype = placeholder.dtype
        self._grid = grid
        self._quantizer = quantizer
        self._account = account
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        # Nothing is ever written to units without elements.
        self._done = bytearray([not grid.unit_volume]) * grid.count
        self._staged: dict[int, StagedUnit] = {}
        self._busy: set[int] = set()
        self._waiting = 0

    @property
    def kind(self) -> Hashable:
        """Equal for streams whose units are quantized by the same kernels."""
        return type(self._quantizer), self._grid.shape, self._dtype

    def warm_up(self) -> None:
        """On a device, quantize a unit of zeros before anything is written, so that kernels are compiled only once."""
        if self.storage.weight.device.type not in ("cpu", "meta"):
            self._quantize_missing(0)

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Take a write of ``source`` to the view ``destination`` of the placeholder. Shapes are equal.

        Raises:
            UnsupportedWriteError: the view is not a box of the parameter, or has another dtype.
            UnsupportedDtypeError: the source holds integers.
        """
        if not destination.numel():
            return
        if destination.dtype != self._dtype:
            raise UnsupportedWriteError(f"{self.name} is written as {destination.dtype}")
        # A fill's single element is exact in any dtype.
        if not source.is_floating_point() and any(source.stride()):
            raise UnsupportedDtypeError(f"{self.name} was to be filled from a tensor of dtype {source.dtype}")
        first, region = self._regions.of(destination)
        # Quantizers read raw memory, which lacks the lazy sign of a negative view.
        self._place(first, region, source.resolve_neg())

    def _place(self, first: int, region: TargetRegion, source: torch.Tensor) -> None:
        """Write ``source`` to ``region``, beginning in unit ``first``."""
        values = region.lay_out(source)
        if region.is_whole and any(values.stride()):
            self._write_whole(range(first, first + region.count), values)
            return
        if region.count == 1:
            self._write_part(first, Piece(region.box, values))
            return
        for number in range(region.count):
            self._write_part(first + number, Piece(region.box, values[number]))

    def settle(self, *, zeros: bool = False) -> list[int]:
        """Quantize covered units that had to wait for the end of loading, and release all staging memory.

        To be called once, when no loader runs any more. Units that were not completely written stay as they are, or
        have zeros where nothing was written, so that no memory stays uninitialized.

        Args:
            zeros: whether to fill.

        Returns:
            Units that were never completely written, in order.

        Raises:
            ConflictingWriteError: part of a quantized unit was written again.
        """
        self._wait()
        for unit, staged in list(self._staged.items()):
            if staged.covered == self._grid.unit_volume:
                self._quantize(unit, staged.pieces)
            elif self._done[unit]:
                self._refuse_conflict(unit, staged.pieces)
        missing = [unit for unit, done in enumerate(self._done) if not done]
        for unit in missing if zeros else ():
            self._quantize_missing(unit)
        self.drop_staged()
        return missing

    def _refuse_conflict(self, unit: int, pieces: Sequence[Piece]) -> None:
        raise ConflictingWriteError(self.name, f"part of unit {unit} was written again after it had been quantized")

    def drop_staged(self) -> None:
        """Release all staging memory."""
        for unit in list(self._staged):
            self._drop(unit)

    def _write_whole(self, units: range, values: torch.Tensor) -> None:
        with self._claim(units):
            for number, unit in enumerate(units):
                if unit in self._staged:
                    self._replace(unit, Piece(self._grid.full, values if len(units) == 1 else values[number]))
                    self._drop(unit)
        if len(units) == 1:
            job = partial(self._quantize, units.start, [Piece(self._grid.full, values)])
        else:
            job = partial(self._quantize_run, units, values)
        self._run(units, values, job)

    def _write_part(self, unit: int, piece: Piece) -> None:
        units = range(unit, unit + 1)
        with self._claim(units):
            staged = self._staged.get(unit)
            if staged is None:
                staged = self._staged[unit] = StagedUnit(self._account)
            else:
                self._replace(unit, piece)
            if not self._completes(staged, piece):
                self._stage(unit, staged, piece)
                self._release(units)
                return
            job = partial(self._quantize, unit, [*staged.pieces, piece])
        self._run(units, piece.values, job)

    def _replace(self, unit: int, piece: Piece) -> None:
        """Discard what is staged where ``piece`` is about to be written: the last write wins, as without streaming."""
        self._staged[unit].overwrite(piece.box)

    def _run(self, units: range, values: torch.Tensor, job: Callable[[], None]) -> None:
        """Run ``job``, which reads ``values`` as they were written, then end the claim on ``units``."""
        with Release(self, units):
            job()

    def _stage(self, unit: int, staged: StagedUnit, piece: Piece) -> None:
        """Keep a copy of ``piece``: its loader may reuse the memory once it returns."""
        staged.hold(piece.copied(self._dtype, piece.values.device))

    def _completes(self, staged: StagedUnit, piece: Piece) -> bool:
        if staged.covered + piece.size < self._grid.unit_volume or staged.has_background:
            return False
        return not (piece.is_fill and all(held.is_fill for held in staged.pieces))

    def _quantize_run(self, units: range, values: torch.Tensor) -> None:
        # A checkpoint may have all experts of a layer in one tensor, too much to be on the device at once.
        at_once = max(1, MOST_AT_ONCE // self._grid.unit_volume)
        for start in range(0, len(units), at_once):
            part = units[start : start + at_once]
            self._quantize_units(slice(part.start, part.stop), self._on_device(values[start : start + at_once]))
        self._done[units.start : units.stop] = bytes([1]) * len(units)

    def _quantize_units(self, run: slice, values: torch.Tensor) -> torch.Tensor:
        with made_current(self.storage.weight.device):
            return self._quantizer.quantize_run(values, self.storage.weight[run], self.storage.scale[run])

    def _quantize(self, unit: int, pieces: Sequence[Piece]) -> None:
        self._quantize_unit(unit, pieces)
        self._drop(unit)
        self._done[unit] = 1

    def _quantize_missing(self, unit: int) -> None:
        staged = self._staged.get(unit)
        values = torch.zeros(self._grid.shape, dtype=self._dtype, device=self.storage.weight.device)
        for piece in staged.pieces if staged else ():
            values[slices(piece.box)].copy_(piece.values)
        self._quantize_unit(unit, [Piece(self._grid.full, values)])

    def _quantize_unit(self, unit: int, pieces: Sequence[Piece]) -> torch.Tensor | float:
        weight, scale = self.storage.weight[unit], self.storage.scale[unit]
        with made_current(weight.device):
            return self._quantizer.quantize([self._for_quantizer(piece) for piece in pieces], weight, scale)

    def _drop(self, unit: int) -> None:
        staged = self._staged.pop(unit, None)
        if staged is not None:
            staged.release()

    def _for_quantizer(self, piece: Piece) -> Piece:
        """``piece`` in the parameter's dtype; the quantizer copies it to the device."""
        return piece if piece.values.dtype == self._dtype else Piece(piece.box, self._on_device(piece.values))

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        # Without streaming a float32 checkpoint is cast to the parameter's dtype before it is quantized.
        return values.to(device=self.storage.weight.device, dtype=self._dtype)

    def _claim(self, units: range) -> ReleaseOnError:
        with self._lock:
            if not self._busy.isdisjoint(units):
                self._wait_until(lambda: self._busy.isdisjoint(units))
            self._busy.update(units)
        return ReleaseOnError(self, units)

    def _release(self, units: range) -> None:
        with self._lock:
            self._busy.difference_update(units)
            if self._waiting:
                self._condition.notify_all()

    def _wait(self) -> None:
        """Wait until no unit is being quantized."""
        with self._condition:
            self._wait_until(lambda: not self._busy)

    def _wait_until(self, is_free: Callable[[], bool]) -> None:
        """Wait, with the lock held; other threads can take it meanwhile."""
        self._waiting += 1
        try:
            self._condition.wait_for(is_free)
        finally:
            self._waiting -= 1


class Release(AbstractContextManager[None]):
    """Always ends the claim on units. A class, since a generator would take longer than placing a small tensor."""

    __slots__ = ("_stream", "_units")

    def __init__(self, stream: ParameterStream, units: range) -> None:
        self._stream = stream
        self._units = units

    def __exit__(self, kind: type[BaseException] | None, *about: object) -> None:
        self._stream._release(self._units)


class ReleaseOnError(Release):
    """Ends the claim on units if the block fails; otherwise the code that continues with them ends it."""

    __slots__ = ()

    def __exit__(self, kind: type[BaseException] | None, *about: object) -> None:
        if kind is not None:
            super().__exit__(kind, *about)
