# SPDX-License-Identifier: Apache-2.0
"""A stream that knows the checkpoint: names of tensors, memory that need not be copied, contradictions, jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from sglang_overlay.core import row_runs
from sglang_overlay.core.errors import (
    ConflictingWriteError,
    LayerNotStreamableError,
    UnsupportedDtypeError,
    UnsupportedWriteError,
)
from sglang_overlay.core.executor import Executor
from sglang_overlay.core.quantizers import Magnitudes, UnitQuantizer
from sglang_overlay.core.regions import intersection, shifted, slices
from sglang_overlay.core.shortage import shortage_explained
from sglang_overlay.core.sources import CheckpointSources, Watch
from sglang_overlay.core.staging import Piece, StagedUnit, StagingAccount
from sglang_overlay.core.stream import ParameterStream, Release, ReleaseOnError, Storage
from sglang_overlay.core.units import TargetRegion, UnitGrid


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


class CheckpointStream(ParameterStream):
    """A ``ParameterStream`` of this package's loads.

    A unit's ``_watches`` belong to the thread that has claimed it, or to the job that its executor runs. Any thread may
    add to ``origins`` and ``rewritten``; they are read when no loader runs, or for a message.

    Args:
        name: as of ``ParameterStream``, as the next five.
        placeholder: the meta parameter.
        grid: its units.
        quantizer: of one unit or several.
        storage: fp8 values and scales.
        account: of staging memory.
        sources: knows the names of checkpoint tensors, and which memory stays unchanged after a loader has returned.
        executor: runs the quantizing jobs.
        progress: called, from any thread, with the bytes of fp8 written each time units are done.
        rows: watches the checkpoint's rows if the parameter holds only some of their columns, but scales depend on all.
        mark: fills the memory that a fallback to stock gets, so that the load can find what is never written.

    Attributes:
        sources: as given.
        rows: as given.
        origins: names of the checkpoint tensors that were written.
        rewritten: checkpoint tensors (or the parameter, if unknown) that replaced other values, staged or quantized.
    """

    _quantizer: UnitQuantizer

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
        progress: Callable[[int], None] | None = None,
        rows: RowWatcher | None = None,
        mark: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        super().__init__(name, placeholder, grid, quantizer, storage, account)
        self.sources = sources
        self.rows = rows
        self.origins = Origins()
        self.rewritten: set[str] = set()
        self._executor = Executor() if executor is None else executor
        self._progress = progress
        self._mark = mark
        self._watches: dict[int, list[Watch]] = {}
        self._direct = bytearray(grid.count)
        self._magnitudes = Magnitudes(grid.count, storage.weight.device)
        self._unit_bytes = grid.unit_volume * storage.weight.element_size()
        self._unit_explained = self._quantizing_explained(1)
        account.store(storage.weight.nbytes + storage.scale.nbytes)

    @property
    def magnitudes(self) -> torch.Tensor:
        """The largest magnitude of each unit, float32 ``[units]`` on the storage's device; see ``units_not_finite``."""
        return self._magnitudes.found

    @property
    def direct_units(self) -> int:
        """Number of units that came whole in one write at least once, and needed no staging."""
        return sum(self._direct)

    @property
    def done_units(self) -> int:
        """Number of units quantized so far."""
        return sum(self._done)

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """As of ``ParameterStream``.

        Raises:
            UnsupportedWriteError: the view is not a box of the parameter, nor a run of rows, or has another dtype.
            UnsupportedDtypeError: the source holds integers.
            ConflictingWriteError: a staged checkpoint tensor was changed after its loader returned.
            StagingMemoryError: memory ran out.
        """
        self._executor.check()
        if destination.dtype == self._dtype:
            self._refuse_integers(source)
        try:
            super().write(destination, source)
        except UnsupportedWriteError as refused:
            if destination.dtype != self._dtype:
                raise
            for part in row_runs.split(self._grid, destination, source, refused):
                self.write(*part)

    def _place(self, first: int, region: TargetRegion, source: torch.Tensor) -> None:
        if self.rows is not None:
            self.rows.see(first, region, source)
        origin = self.sources.name_of(source)
        if origin:
            self.origins.note(first, region, origin)
        super()._place(first, region, source)

    def settle(self, *, zeros: bool = False) -> list[int]:
        """As of ``ParameterStream``.

        Raises:
            ConflictingWriteError: part of a quantized unit was written again with other values, or a staged checkpoint
                tensor was changed after its loader returned.
        """
        self._refuse_changes()
        return super().settle(zeros=zeros)

    def restore(self) -> torch.Tensor:
        """Everything written so far, in high precision on the storage's device, as stock would hold it. Ends streaming.

        Raises:
            LayerNotStreamableError: some units have been quantized, so their high-precision values are gone.
            ConflictingWriteError: a staged checkpoint tensor was changed after its loader returned.
        """
        self._refuse_changes()
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

    def _refuse_changes(self) -> None:
        self._wait()
        self._refuse_changed(watch for watches in self._watches.values() for watch in watches)

    def _unwritten(self) -> torch.Tensor:
        """High-precision memory for the whole parameter, unwritten and marked."""
        weight = torch.empty(self._shape, dtype=self._dtype, device=self.storage.weight.device)
        if self._mark is not None:
            self._mark(weight)
        return weight

    def _claim(self, units: range) -> ReleaseOnError:
        claim = super()._claim(units)
        if self.rows is not None:
            with claim:
                self.rows.note(units)
        return claim

    def _wait(self) -> None:
        super()._wait()
        self._executor.check()

    def _replace(self, unit: int, piece: Piece) -> None:
        """Notes if other values are discarded; zeros that a loader fills a parameter with are meant to be."""
        if not piece.is_fill and any(self._differs(held, piece) for held in self._staged[unit].pieces):
            self.rewritten.add(self.sources.name_of(piece.values) or self.name)
        super()._replace(unit, piece)

    def _differs(self, held: Piece, piece: Piece) -> bool:
        common = intersection(held.box, piece.box)
        if common is None or held.is_fill:
            return False
        before, now = (one.values[slices(shifted(common, one.box))] for one in (held, piece))
        now = now.to(device=before.device, dtype=before.dtype)
        # As bits: NaN differs from itself.
        bits = {2: torch.int16, 4: torch.int32}[before.element_size()]
        return not torch.equal(before.view(bits), now.view(bits))

    def _stage(self, unit: int, staged: StagedUnit, piece: Piece) -> None:
        """Keeps ``piece`` itself if it lies in a mapped file."""
        # is_mapped comes last, since it may have to read the process's mappings.
        if piece.values.dtype == self._dtype and self.sources.is_mapped(piece.values):
            staged.pieces.append(piece)
            self._watches.setdefault(unit, []).append(Watch(piece.values))
            return
        size = piece.size * self._dtype.itemsize
        with shortage_explained(f"to stage a piece of {self.name}", size, self._account):
            super()._stage(unit, staged, piece)

    def _run(self, units: range, values: torch.Tensor, job: Callable[[], None]) -> None:
        """Submits ``job`` if ``values`` stay alive."""
        watches = [watch for unit in units for watch in self._watches.get(unit, ())] if self._watches else []
        explained = self._unit_explained if len(units) == 1 else self._quantizing_explained(len(units))

        def quantize() -> None:
            with Release(self, units), explained:
                job()
                self._refuse_changed(watches)

        size = len(units) * self._grid.unit_volume * self._dtype.itemsize
        if self._executor.takes(size) and self.sources.holds(values):
            watches.append(Watch(values))
            self._executor.submit(quantize)
        else:
            quantize()

    def _quantize_run(self, units: range, values: torch.Tensor) -> None:
        run = slice(units.start, units.stop)
        before = self._stored(units) if any(self._done[run]) else None
        super()._quantize_run(units, values)
        self._direct[run] = bytes([1]) * len(units)
        self._note_quantized(units, before, values)

    def _quantize_units(self, run: slice, values: torch.Tensor) -> torch.Tensor:
        found = super()._quantize_units(run, values)
        self._magnitudes.note_run(run, found)
        return found

    def _quantize(self, unit: int, pieces: Sequence[Piece]) -> None:
        units = range(unit, unit + 1)
        before = self._stored(units) if self._done[unit] else None
        super()._quantize(unit, pieces)
        self._direct[unit] |= len(pieces) == 1
        self._note_quantized(units, before, pieces[-1].values)

    def _quantize_unit(self, unit: int, pieces: Sequence[Piece]) -> torch.Tensor | float:
        found = super()._quantize_unit(unit, pieces)
        self._magnitudes.note(unit, found)
        return found

    def _note_quantized(self, units: range, before: list[bytes] | None, values: torch.Tensor) -> None:
        """Notes if already quantized units got other values; the last write wins, as in stock."""
        if before is not None and before != self._stored(units):
            self.rewritten.add(self.sources.name_of(values) or self.name)
        if self._progress is not None:
            self._progress(len(units) * self._unit_bytes)

    def _stored(self, units: range) -> list[bytes]:
        parts = (self.storage.weight, self.storage.scale)
        return [part[units.start : units.stop].cpu().contiguous().view(torch.uint8).numpy().tobytes() for part in parts]

    def _refuse_conflict(self, unit: int, pieces: Sequence[Piece]) -> None:
        weight, scale = self.storage.weight[unit], self.storage.scale[unit]
        for piece in pieces:
            if not self._quantizer.could_be(Piece(piece.box, self._on_device(piece.values)), weight, scale):
                names = ", ".join(self.origins([unit])) or "a tensor"
                raise ConflictingWriteError(
                    self.name,
                    f"part of unit {unit} was written again with other values after it had been quantized; {names} may "
                    "be in the checkpoint twice",
                )

    def _refuse_integers(self, source: torch.Tensor) -> None:
        if source.is_floating_point():
            return
        origin = self.sources.name_of(source)
        # A fill's single element is not a checkpoint tensor, and is exact in any dtype.
        if origin or any(source.stride()):
            raise UnsupportedDtypeError(
                f"{self.name} was to be filled from {origin or 'a tensor'} of dtype {source.dtype}. "
                "A checkpoint whose weights are integers is quantized already: stock SGLang would take the integers "
                "for weights. Use the unquantized checkpoint, or the --quantization that belongs to this one."
            )

    def _drop(self, unit: int) -> None:
        super()._drop(unit)
        self._watches.pop(unit, None)

    def _for_quantizer(self, piece: Piece) -> Piece:
        """Uploads ``piece`` if the executor has to see each one."""
        if piece.is_fill or not self._executor.uploads:
            return super()._for_quantizer(piece)
        return Piece(piece.box, self._on_device(piece.values))

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        device = self.storage.weight.device
        is_there = values.dtype == self._dtype and values.device == device and not self._executor.uploads
        return values if is_there else self._executor.to_device(values, device, self._dtype)

    def _quantizing_explained(self, units: int) -> AbstractContextManager[None]:
        size = units * self._grid.unit_volume * self._dtype.itemsize
        return shortage_explained(f"to quantize {self.name}", size, self._account)

    def _refuse_changed(self, watches: Iterable[Watch]) -> None:
        if any(watch.has_changed for watch in watches):
            raise ConflictingWriteError(self.name, "a checkpoint tensor was changed after its weight loader returned")
