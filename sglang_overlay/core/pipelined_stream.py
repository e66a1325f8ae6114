# SPDX-License-Identifier: Apache-2.0
"""Quantize beside the loader, and stage without copies, where the source is known to stay as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch

from sglang_overlay.core import sentinel
from sglang_overlay.core.errors import ConflictingWriteError, UnsupportedWriteError
from sglang_overlay.core.huge_pages import HugePages
from sglang_overlay.core.mapped_sources import MappedSources, Watch
from sglang_overlay.core.pipeline import Pipeline
from sglang_overlay.core.staging import Piece, StagedUnit
from sglang_overlay.core.stream import ParameterStream, Release, ReleaseOnError
from sglang_overlay.core.whole_rows import WholeRows


class PipelinedStream(ParameterStream):
    """A ``ParameterStream`` that works with the checkpoint's own memory after a loader has returned.

    A busy unit may belong to the job that was submitted for it. ``_watches`` belongs to units as their staging does.

    Args:
        arguments: those of ``ParameterStream``, in order; its sources tell which memory stays as it is.
        quantized: called with the bytes of fp8 written, each time units are done; from any thread.
        pipeline: where units from such memory are quantized.
        upload: brings host memory to the storage's device; None leaves that to torch.
        huge_pages: that the storage may have, on the CPU.
        rows: the checkpoint's, where the parameter has only some of their columns and is quantized by all of them.
    """

    _sources: MappedSources

    def __init__(
        self,
        *arguments: Any,
        quantized: Callable[[int], None],
        pipeline: Pipeline,
        upload: Callable[[torch.Tensor], torch.Tensor] | None = None,
        huge_pages: HugePages | None = None,
        rows: WholeRows | None = None,
    ) -> None:
        super().__init__(*arguments)
        self.rows = rows
        self._huge_pages = huge_pages
        self._address = 0 if huge_pages is None else self.storage.weight.data_ptr()
        self._unit_bytes = self._grid.unit_volume * self.storage.weight.element_size()
        self._report = quantized
        self._pipeline = pipeline
        self._upload = upload
        self._watches: dict[int, list[Watch]] = {}

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        if self.rows is not None and destination.numel():
            # What is no box is refused, or comes again in parts that are.
            with suppress(UnsupportedWriteError):
                self.rows.see(*self._landings.of(destination), source)
        super().write(destination, source)

    @property
    def partial_units(self) -> list[int]:
        """Units of which a part has come and the rest has not, in order. For when no loader runs."""
        self._wait()
        return sorted(
            unit
            for unit, staged in self._staged.items()
            if not self._done[unit] and staged.covered < self._grid.unit_volume
        )

    def restore(self) -> torch.Tensor:
        self._wait()
        self._refuse_changed(self._all_watches())
        return super().restore()

    def _unwritten(self) -> torch.Tensor:
        weight = super()._unwritten()
        # So that whoever looks after the layer from now on can tell.
        sentinel.fill(weight)
        return weight

    def release(self) -> None:
        super().release()
        self._watches.clear()

    def _settle(self) -> list[int]:
        self._wait()
        self._refuse_changed(self._all_watches())
        return super()._settle()

    def _run(self, units: range, source: torch.Tensor, job: Callable[[], None]) -> None:
        """Beside the loader where ``source`` stays as it is, else at once."""
        watches = [Watch(source)]
        if self._watches:
            watches += (watch for unit in units for watch in self._watches.get(unit, ()))

        def quantize() -> None:
            with Release(self, units), self._shortage_explained(units):
                job()
                self._refuse_changed(watches)

        with ReleaseOnError(self, units):
            self._pipeline.check()
        size = len(units) * self._grid.unit_volume * self._dtype.itemsize
        if self._pipeline.takes(size) and self._sources.holds(source):
            self._pipeline.submit(quantize)
        else:
            quantize()

    def _claim(self, units: range) -> ReleaseOnError:
        claim = super()._claim(units)
        if self.rows is not None:
            with claim:
                self.rows.note(units)
        return claim

    def _stage(self, unit: int, staged: StagedUnit, piece: Piece, source: torch.Tensor) -> None:
        # Last, since it may have to read the process's mappings.
        if piece.values.dtype == self._dtype and self._sources.is_mapped(source):
            staged.pieces.append(piece)
            self._watches.setdefault(unit, []).append(Watch(source))
        else:
            super()._stage(unit, staged, piece, source)

    def _for_quantizer(self, piece: Piece) -> Piece:
        if self._upload is None or piece.is_fill:
            return super()._for_quantizer(piece)
        return Piece(piece.box, self._on_device(piece.values))

    def _on_device(self, values: torch.Tensor) -> torch.Tensor:
        if self._upload is not None and values.device.type == "cpu":
            values = self._upload(values)
        return super()._on_device(values)

    def _quantize_run(self, units: range, values: torch.Tensor, source: torch.Tensor) -> None:
        self._use_huge_pages(units)
        super()._quantize_run(units, values, source)
        self._count(len(units))

    def _quantize(self, unit: int, pieces: Sequence[Piece], source: torch.Tensor | None = None) -> None:
        self._use_huge_pages(range(unit, unit + 1))
        super()._quantize(unit, pieces, source)
        self._count(1)

    def _drop(self, unit: int) -> None:
        super()._drop(unit)
        self._watches.pop(unit, None)

    def _wait(self) -> None:
        super()._wait()
        self._pipeline.check()

    def _use_huge_pages(self, units: range) -> None:
        if self._huge_pages is not None:
            start = self._address + units.start * self._unit_bytes
            self._huge_pages.use(start, start + len(units) * self._unit_bytes)

    def _count(self, units: int) -> None:
        self._report(units * self._unit_bytes)

    def _all_watches(self) -> list[Watch]:
        return [watch for watches in self._watches.values() for watch in watches]

    def _refuse_changed(self, watches: Iterable[Watch]) -> None:
        if any(watch.has_changed for watch in watches):
            raise ConflictingWriteError(self.name, "a checkpoint tensor was changed after its weight loader returned")
