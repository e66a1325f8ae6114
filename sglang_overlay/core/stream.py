# SPDX-License-Identifier: Apache-2.0
"""One streamed parameter: takes writes, stages incomplete units, quantizes complete ones into the fp8 storage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from sglang_overlay.core.errors import (
    ConflictingWriteError,
    LayerNotStreamableError,
    UnsupportedDtypeError,
    UnsupportedWriteError,
)
from sglang_overlay.core.executor import Executor
from sglang_overlay.core.quantizers import Magnitudes, UnitQuantizer, made_current
from sglang_overlay.core.regions import slices
from sglang_overlay.core.shortage import shortage_explained
from sglang_overlay.core.sources import CheckpointSources, Watch
from sglang_overlay.core.staging import Piece, StagedUnit, StagingAccount
from sglang_overlay.core.units import TargetRegion, TargetRegions, UnitGrid


@dataclass(frozen=True)
class Storage:
    """Final memory of a parameter.

    Attributes:
        weight: fp8, ``(units, *unit shape)``.
        scale: float32, first dimension ``units``.
    """

    weight: torch.Tensor
    scale: torch.Tensor


class Origins:
    """Names of the checkpoint tensors that were written into a parameter, for messages. Outlives the stream."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, TargetRegion], str] = {}

    def __call__(self, units: Sequence[int] | None = None) -> list[str]:
        """Known names of the tensors that were written into ``units``, by default into any unit."""
        wanted = None if units is None else set(units)
        touching = (
            name
            for (first, region), name in self._found.items()
            if wanted is None or not wanted.isdisjoint(range(first, first + region.count))
        )
        return list(dict.fromkeys(touching))

    def note(self, first: int, region: TargetRegion, name: str) -> None:
        """``name`` was written, beginning in unit ``first``."""
        self._found[first, region] = name


class RowWatcher(Protocol):
    """Looks at whole checkpoint rows when some of their columns are written (``core/whole_rows.py``).

    Attributes:
        is_narrowed: some values came without the rest of their rows.
    """

    is_narrowed: bool

    def see(self, first: int, region: TargetRegion, source: torch.Tensor) -> None:
        """This thread is about to write ``source`` to ``region``, beginning in unit ``first``."""

    def note(self, units: range) -> None:
        """This thread has claimed ``units``, and is about to write what it has passed to ``see``."""


class ParameterStream:
    """Quantizes one parameter unit by unit while it is written.

    Any thread may write. ``_lock`` guards ``_busy``, the claimed units, and ``_waiting``, the number of waiters. A busy
    unit, with its state, staging and ``_watches``, belongs to the thread that claimed it or to the job submitted
    for it. Copying and quantizing happen without the lock, so different units are quantized concurrently. Any thread
    may add to ``origins`` and ``_rewritten``; they are read when no loader runs, or for a message.

    Args:
        name: for messages, for example ``model.layers.3.mlp.experts.w13_weight``.
        placeholder: the meta parameter that upstream's loader writes to.
        grid: how the parameter divides into units.
        quantizer: turns a complete unit into fp8.
        storage: where the results go. Staged pieces stay on the device they came from: device memory is scarce.
        account: counts staging memory.
        sources: knows the names of checkpoint tensors, and which memory stays unchanged after a loader has returned.
        executor: runs the quantizing jobs.
        quantized: called, from any thread, with the bytes of fp8 written each time units are done.
        rows: watches the checkpoint's rows if the parameter holds only some of their columns, but scales depend on all.
        mark: fills the memory that a fallback to stock gets, so that the load can find what is never written.

    Attributes:
        origins: names of the checkpoint tensors that were written.
        rows: as given.
    """

    def __init__(
        self,
        name: str,
        placeholder: torch.Tensor,
        grid: UnitGrid,
        quantizer: UnitQuantizer,
        storage: Storage,
        account: StagingAccount,
        sources: CheckpointSources,
        *,
        executor: Executor | None = None,
        quantized: Callable[[int], None] | None = None,
        rows: RowWatcher | None = None,
        mark: Callable[[torch.Tensor], None] | None = None,
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
        self._sources = sources
        self._executor = Executor() if executor is None else executor
        self._report = quantized
        self.rows = rows
        self._mark = mark
        self._unit_bytes = grid.unit_volume * storage.weight.element_size()
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        self._done = bytearray(grid.count)
        self._direct = bytearray(grid.count)
        self._staged: dict[int, StagedUnit] = {}
        self._watches: dict[int, list[Watch]] = {}
        self._busy: set[int] = set()
        self._waiting = 0
        self._magnitudes = Magnitudes(grid.count, storage.weight.device)
        self.origins = Origins()
        self._rewritten: set[str] = set()
        self._unit_explained = self._quantizing_explained(1)
        account.store(storage.weight.nbytes + storage.scale.nbytes)

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
            UnsupportedWriteError: the view is not a box of the parameter.
            UnsupportedDtypeError: the source holds integers.
            ConflictingWriteError: a staged checkpoint tensor was changed after its loader returned.
            StagingMemoryError: memory ran out.
        """
        if not destination.numel():
            return
        self._executor.check()
        origin = self._sources.name_of(source)
        self._refuse_integers(source, origin)
        # Quantizers read raw memory, which lacks the lazy sign of a negative view.
        source = source.resolve_neg()
        try:
            first, region = self._regions.of(destination)
        except UnsupportedWriteError as refused:
            for part in self._regions.split(destination, source, refused):
                self.write(*part)
            return
        if self.rows is not None:
            self.rows.see(first, region, source)
        values = region.lay_out(source)
        if origin:
            self.origins.note(first, region, origin)
        if region.is_whole and any(values.stride()):
            self._write_whole(range(first, first + region.count), values, source)
            return
        if region.count == 1:
            self._write_part(first, Piece(region.box, values), source)
            return
        for number in range(region.count):
            self._write_part(first + number, Piece(region.box, values[number]), source)

    def settle(self) -> list[int]:
        """Quantize covered units that had to wait for the end of loading, and release all staging memory.

        To be called once, when no loader runs any more. Units that were not completely written stay as they are.

        Returns:
            Units that were never completely written, in order.

        Raises:
            ConflictingWriteError: part of a quantized unit was written again with other values, or a staged checkpoint
                tensor was changed after its loader returned.
        """
        missing = self._settle()
        self.drop_staged()
        return missing

    def settle_with_zeros(self) -> list[int]:
        """Like ``settle``, but fills the unwritten parts of units with zeros, so that no memory stays uninitialized."""
        missing = self._settle()
        for unit in missing:
            self._quantize_missing(unit)
        self.drop_staged()
        return missing

    def _settle(self) -> list[int]:
        self._wait()
        self._refuse_changed(self._all_watches())
        for unit, staged in list(self._staged.items()):
            if staged.covered == self._grid.unit_volume:
                self._quantize(unit, staged.pieces)
            elif self._done[unit]:
                self._compare(unit, staged.pieces)
        return [unit for unit, done in enumerate(self._done) if not done]

    @property
    def magnitudes(self) -> torch.Tensor:
        """The largest magnitude of each unit, float32 ``[units]`` on the storage's device; see ``units_not_finite``."""
        return self._magnitudes.found

    def origin_of(self, tensor: torch.Tensor) -> str:
        """The checkpoint's name for the tensor that ``tensor`` is a view of; empty if unknown."""
        return self._sources.name_of(tensor)

    @property
    def rewritten(self) -> list[str]:
        """Checkpoint tensors (or the parameter, if unknown) that replaced other values of already quantized units."""
        return sorted(self._rewritten)

    @property
    def direct_units(self) -> int:
        """Number of units that came whole in one write at least once, and needed no staging."""
        return sum(self._direct)

    @property
    def done_units(self) -> int:
        """Number of units quantized so far."""
        return sum(self._done)

    def restore(self) -> torch.Tensor:
        """Everything written so far, in high precision on the storage's device, as stock would hold it. Ends streaming.

        Raises:
            LayerNotStreamableError: some units have been quantized, so their high-precision values are gone.
            ConflictingWriteError: a staged checkpoint tensor was changed after its loader returned.
        """
        self._wait()
        self._refuse_changed(self._all_watches())
        if any(self._done):
            raise LayerNotStreamableError(self.name, f"{sum(self._done)} of {self.units} units are quantized already")
        weight = self._unwritten()
        units = weight if self._grid.sliced else weight.unsqueeze(0)
        for unit, staged in self._staged.items():
            for piece in staged.pieces:
                units[unit][slices(piece.box)].copy_(piece.values)
        self.drop_staged()
        return weight.view(self._placeholder_shape)

    def abandon(self) -> torch.Tensor:
        """Memory as ``restore`` returns it, without the values, which are lost. Ends streaming."""
        self._wait()
        self.drop_staged()
        return self._unwritten().view(self._placeholder_shape)

    def _unwritten(self) -> torch.Tensor:
        """High-precision memory for the whole parameter, unwritten and marked."""
        weight = torch.empty(self._shape, dtype=self._dtype, device=self.storage.weight.device)
        if self._mark is not None:
            self._mark(weight)
        return weight

    def drop_staged(self) -> None:
        """Release all staging memory."""
        for staged in self._staged.values():
            staged.release()
        self._staged.clear()
        self._watches.clear()

    def _write_whole(self, units: range, values: torch.Tensor, source: torch.Tensor) -> None:
        with self._claim(units):
            for unit in units:
                self._drop(unit)
            values = self._on_device(values)
        if len(units) == 1:
            job = partial(self._quantize, units.start, [Piece(self._grid.full, values)], source)
        else:
            job = partial(self._quantize_run, units, values, source)
        self._run(units, source, job)

    def _write_part(self, unit: int, piece: Piece, source: torch.Tensor) -> None:
        units = range(unit, unit + 1)
        with self._claim(units):
            staged = self._staged.get(unit)
            if staged is None:
                staged = self._staged[unit] = StagedUnit(self._account)
            staged.overwrite(piece.box)
            if not self._completes(staged, piece):
                self._stage(unit, staged, piece, source)
                self._release(units)
                return
            pieces = [self._for_quantizer(each) for each in (*staged.pieces, piece)]
        self._run(units, source, partial(self._quantize, unit, pieces, source))

    def _run(self, units: range, source: torch.Tensor, job: Callable[[], None]) -> None:
        """Run ``job``, which reads ``source``, then end the claim on ``units``. Submitted if ``source`` stays alive."""
        watches = [watch for unit in units for watch in self._watches.get(unit, ())] if self._watches else []

        def quantize() -> None:
            with Release(self, units), self._shortage_explained(units):
                job()
                self._refuse_changed(watches)

        size = len(units) * self._grid.unit_volume * self._dtype.itemsize
        if self._executor.takes(size) and self._sources.holds(source):
            watches.append(Watch(source))
            self._executor.submit(quantize)
        else:
            quantize()

    def _stage(self, unit: int, staged: StagedUnit, piece: Piece, source: torch.Tensor) -> None:
        """Keep ``piece``, or a copy of it if the loader may reuse the memory of ``source`` once it returns."""
        # is_mapped comes last, since it may have to read the process's mappings.
        if piece.values.dtype == self._dtype and self._sources.is_mapped(source):
            staged.pieces.append(piece)
            self._watches.setdefault(unit, []).append(Watch(source))
            return
        size = piece.size * self._dtype.itemsize
        with shortage_explained(f"to stage a piece of {self.name}", size, self._account):
            staged.hold(self._copied(piece))

    def _copied(self, piece: Piece) -> Piece:
        return piece.copied(self._dtype, piece.values.device)

    def _for_quantizer(self, piece: Piece) -> Piece:
        """``piece`` in the parameter's dtype; the quantizer copies it to the device unless the executor uploads."""
        if piece.values.dtype == self._dtype and (piece.is_fill or not self._executor.uploads):
            return piece
        return Piece(piece.box, self._on_device(piece.values))

    def _completes(self, staged: StagedUnit, piece: Piece) -> bool:
        if staged.covered + piece.size < self._grid.unit_volume or staged.has_background:
            return False
        return not (piece.is_fill and all(held.is_fill for held in staged.pieces))

    def _quantize_run(self, units: range, values: torch.Tensor, source: torch.Tensor) -> None:
        run = slice(units.start, units.stop)
        before = self._stored_before(units)
        with made_current(self.storage.weight.device):
            found = self._quantizer.quantize_run(values, self.storage.weight[run], self.storage.scale[run])
        self._magnitudes.note_run(run, found)
        self._note_rewriting(units, before, source)
        self._done[run] = self._direct[run] = bytes([1]) * len(units)
        self._tell(len(units))

    def _quantize(self, unit: int, pieces: Sequence[Piece], source: torch.Tensor | None = None) -> None:
        units = range(unit, unit + 1)
        before = self._stored_before(units)
        self._quantize_unit(unit, pieces)
        self._note_rewriting(units, before, source)
        self._drop(unit)
        self._done[unit] = 1
        self._direct[unit] |= len(pieces) == 1
        self._tell(1)

    def _quantize_missing(self, unit: int) -> None:
        staged = self._staged.get(unit)
        values = torch.zeros(self._grid.shape, dtype=self._dtype, device=self.storage.weight.device)
        for piece in staged.pieces if staged else ():
            values[slices(piece.box)].copy_(piece.values)
        self._quantize_unit(unit, [Piece(self._grid.full, values)])

    def _quantize_unit(self, unit: int, pieces: Sequence[Piece]) -> None:
        weight, scale = self.storage.weight[unit], self.storage.scale[unit]
        with made_current(weight.device):
            self._magnitudes.note(unit, self._quantizer.quantize(pieces, weight, scale))

    def _stored_before(self, units: range) -> list[bytes] | None:
        """The stored bytes of ``units`` if any of them has been quantized before."""
        return self._stored(units) if any(self._done[units.start : units.stop]) else None

    def _note_rewriting(self, units: range, before: list[bytes] | None, source: torch.Tensor | None) -> None:
        """Note if already quantized units got other values; the last write wins, as in stock."""
        if before is not None and before != self._stored(units):
            self._rewritten.add((source is not None and self._sources.name_of(source)) or self.name)

    def _compare(self, unit: int, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            piece = Piece(piece.box, self._on_device(piece.values))
            if not self._quantizer.could_be(piece, self.storage.weight[unit], self.storage.scale[unit]):
                names = ", ".join(self.origins([unit])) or "a tensor"
                raise ConflictingWriteError(
                    self.name,
                    f"part of unit {unit} was written again with other values after it had been quantized; {names} may "
                    "be in the checkpoint twice",
                )

    def _stored(self, units: range) -> list[bytes]:
        parts = (self.storage.weight, self.storage.scale)
        return [part[units.start : units.stop].cpu().contiguous().view(torch.uint8).numpy().tobytes() for part in parts]

    def _refuse_integers(self, source: torch.Tensor, origin: str) -> None:
        # A fill's single element is not a checkpoint tensor, and is exact in any dtype.
        if source.is_floating_point() or not (origin or any(source.stride())):
            return
        raise UnsupportedDtypeError(
            f"{self.name} was to be filled from {origin or 'a tensor'} of dtype {source.dtype}. "
            "A checkpoint whose weights are integers is quantized already: stock SGLang would take the integers for "
            "weights. Use the unquantized checkpoint, or the --quantization that belongs to this one."
        )

    def _shortage_explained(self, units: range) -> AbstractContextManager[None]:
        return self._unit_explained if len(units) == 1 else self._quantizing_explained(len(units))

    def _quantizing_explained(self, units: int) -> AbstractContextManager[None]:
        size = units * self._grid.unit_volume * self._dtype.itemsize
        return shortage_explained(f"to quantize {self.name}", size, self._account)

    def _drop(self, unit: int) -> None:
        staged = self._staged.pop(unit, None)
        if staged is not None:
            staged.release()
            self._watches.pop(unit, None)

    def _tell(self, units: int) -> None:
        if self._report is not None:
            self._report(units * self._unit_bytes)

    def _all_watches(self) -> list[Watch]:
        return [watch for watches in self._watches.values() for watch in watches]

    def _refuse_changed(self, watches: Iterable[Watch]) -> None:
        if any(watch.has_changed for watch in watches):
            raise ConflictingWriteError(self.name, "a checkpoint tensor was changed after its weight loader returned")

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        # Stock casts to the parameter's dtype before it quantizes; a float32 checkpoint needs the same here.
        device = self.storage.weight.device
        is_there = values.dtype == self._dtype and values.device == device and not self._executor.uploads
        return values if is_there else self._executor.to_device(values, device, self._dtype)

    def _claim(self, units: range) -> ReleaseOnError:
        with self._lock:
            if not self._busy.isdisjoint(units):
                self._wait_until(lambda: self._busy.isdisjoint(units))
            self._busy.update(units)
        claim = ReleaseOnError(self, units)
        if self.rows is not None:
            with claim:
                self.rows.note(units)
        return claim

    def _release(self, units: range) -> None:
        with self._lock:
            self._busy.difference_update(units)
            if self._waiting:
                self._condition.notify_all()

    def _wait(self) -> None:
        """Wait until no unit is being quantized."""
        with self._condition:
            self._wait_until(lambda: not self._busy)
        self._executor.check()

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
