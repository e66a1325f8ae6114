# SPDX-License-Identifier: Apache-2.0
"""One parameter's stream during a weight update: it can undo a call, and takes quantized values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from sglang_overlay.core.capture import storage_key
from sglang_overlay.core.checkpoint_stream import CheckpointStream
from sglang_overlay.core.executor import Executor
from sglang_overlay.core.loader_calls import LoaderCall
from sglang_overlay.core.sources import Watch
from sglang_overlay.core.staging import Piece, StagedUnit
from sglang_overlay.core.whole_rows import WholeRows
from sglang_overlay.errors import LayerNotStreamableError, WeightUpdateError
from sglang_overlay.load.stored_dtypes import QUANTIZED
from sglang_overlay.update.ready_values import ReadyValues
from sglang_overlay.update.update_capture import dtype_name
from sglang_overlay.update.update_sources import UpdateSources


class UpdateStream(CheckpointStream):
    """A ``CheckpointStream`` for a parameter that is being served.

    Any thread may add to ``_borrowing``, the units that have pieces in memory which is lent.

    Args:
        arguments: those of ``CheckpointStream``; so are ``rows`` and ``executor``.
        ready: takes already quantized values; None if the parameter cannot take any.
        under_way: returns this thread's current loader call, or None.
    """

    sources: UpdateSources

    def __init__(
        self,
        *arguments: Any,
        ready: ReadyValues | None,
        under_way: Callable[[], LoaderCall | None],
        rows: WholeRows | None,
        executor: Executor,
    ) -> None:
        super().__init__(*arguments, executor=executor, rows=rows)
        self._rows = rows
        self._ready = ready
        self._under_way = under_way
        self._borrowing: set[int] = set()

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Like ``CheckpointStream.write``, but also takes quantized values.

        Raises:
            WeightUpdateError: the values are quantized, but not in the way this parameter is.
        """
        source = self._as_padding(source)
        if source.dtype not in QUANTIZED and source.dtype is not self.storage.weight.dtype:
            super().write(destination, source)
            return
        if self._ready is None or source.dtype is not self.storage.weight.dtype:
            raise WeightUpdateError(
                f"{self.name} got values that are quantized already ({dtype_name(source.dtype)}). "
                f"{self._what_is_taken()}"
            )
        if destination.numel():
            self._ready.write_values(destination, source)

    def copy_lent(self) -> None:
        """Copy pieces that wait in memory which is about to be taken back. To be called while no loader runs."""
        for unit in self._borrowing:
            staged = self._staged.get(unit)
            if staged is None:
                continue
            self._watches.pop(unit, None)
            pieces, staged.pieces = staged.pieces, []
            for piece in pieces:
                if self.sources.is_lent(piece.values):
                    super()._stage(unit, staged, piece)
                else:
                    staged.pieces.append(piece)
        self._borrowing.clear()

    def _stage(self, unit: int, staged: StagedUnit, piece: Piece) -> None:
        """Keeps ``piece`` itself while its memory is lent: most units are complete before that is taken back."""
        if piece.values.dtype is not self._dtype or not self.sources.is_lent(piece.values):
            super()._stage(unit, staged, piece)
            return
        staged.pieces.append(piece)
        self._watches.setdefault(unit, []).append(Watch(piece.values))
        self._borrowing.add(unit)

    @property
    def partial_units(self) -> list[int]:
        """Units that have been sent only in part, in order. To be called while no loader runs."""
        self._wait()
        return sorted(
            unit
            for unit, staged in self._staged.items()
            if not self._done[unit] and staged.covered < self._grid.unit_volume
        )

    def _as_padding(self, source: torch.Tensor) -> torch.Tensor:
        """``source``; if a fill pads quantized values, in their dtype."""
        if any(source.stride()):
            return source
        call = self._under_way()
        served = self.storage.weight.dtype
        return source.to(served) if call is not None and call.given.dtype is served else source

    def _what_is_taken(self) -> str:
        if self._ready is None:
            return "It takes weights in high precision only, in the way in which it is served: send those"
        scales = self.storage.scale.numel() // self.units
        return (
            f"It takes weights in high precision, or {dtype_name(self.storage.weight.dtype)} values with their scales "
            f"in {self._ready.name.rpartition('.')[2]} ({scales} for each {self._grid.shape})"
        )

    @property
    def replaced_units(self) -> int:
        """Number of units that hold new values."""
        return self.done_units if self._ready is None else int((self._done_mask() | self._ready.taken).sum())

    @property
    def is_replaced(self) -> bool:
        """Whether all units hold new values."""
        if self._ready is None or not self._ready.taken.any():
            return all(self._done)
        return self.replaced_units == self.units and self.problem is None

    @property
    def covered_units(self) -> int:
        """Number of units that have been sent, but wait for the end. To be called while no loader runs."""
        return sum(
            staged.covered == self._grid.unit_volume and not self._done[unit] for unit, staged in self._staged.items()
        )

    @property
    def has_narrowed_rows(self) -> bool:
        """Whether some values came without the rest of their rows."""
        return self._rows is not None and self._rows.is_narrowed

    @property
    def incomplete(self) -> str | None:
        """A message about units that were sent only in part; None if there are none."""
        partial = self.partial_units
        if partial:
            return f"{self.name} ({len(partial)} of {self.units} units)"
        return self._ready.problem if self._ready is not None and self.mixed is None else None

    @property
    def mixed(self) -> str | None:
        """A message about units that came both in high precision and quantized; None if there are none."""
        if self._ready is None or not (self._ready.taken | self._ready.open_units).any():
            return None
        twice = (self._ready.taken | self._ready.open_units) & self._done_mask()
        if not twice.any():
            return None
        return f"{self.name} ({int(twice.sum())} of {self.units} units: in high precision and quantized as well)"

    @property
    def problem(self) -> str | None:
        """Why the new weight cannot be served; None if it can, or nothing has come."""
        return self.mixed or self.incomplete

    @property
    def has_waiting_units(self) -> bool:
        """Whether complete units wait for the end of the update: their loader clears before it writes."""
        return any(staged.covered == self._grid.unit_volume for staged in self._staged.values())

    @property
    def conflict(self) -> LayerNotStreamableError | None:
        """The error if writes after a unit was complete contradict it, else None. Ends the stream."""
        try:
            self.settle()
        except LayerNotStreamableError as error:
            return error
        return None

    def has_replaced(self, units: Iterable[int]) -> bool:
        """Whether this update has quantized any of ``units``."""
        return any(self._done[unit] for unit in units)

    def saved(self) -> Mapping[str, Any]:
        """A snapshot for ``restore_call``. This and the methods below may be called only while no loader runs."""
        return {
            "staged": {unit: (list(held.pieces), held.has_background) for unit, held in self._staged.items()},
            "watches": {unit: list(watches) for unit, watches in self._watches.items()},
            "done": bytes(self._done),
            "direct": bytes(self._direct),
            "rewritten": set(self.rewritten),
            "ready": None if self._ready is None else self._ready.saved(),
            "rows": self._rows.found.clone() if self._rows is not None and self._staged else None,
        }

    def restore_call(self, saved: Mapping[str, Any]) -> None:
        """Go back to the state at the time of ``saved``."""
        self.drop_staged()
        for unit, (pieces, has_background) in saved["staged"].items():
            staged = self._staged[unit] = StagedUnit(self._account, has_background=has_background)
            known: set[int] = set()
            for piece in pieces:
                # Parts of one piece share its memory, which is counted once; watched pieces lie in mapped files: free.
                if unit in saved["watches"] or storage_key(piece.values) in known:
                    staged.pieces.append(piece)
                else:
                    staged.hold(piece)
                    known.add(storage_key(piece.values))
        self._watches.update(saved["watches"])
        self._done[:] = saved["done"]
        self._direct[:] = saved["direct"]
        self.rewritten = saved["rewritten"]
        if self._ready is not None:
            self._ready.restore(saved["ready"])
        if saved["rows"] is not None and self._rows is not None:
            self._rows.found.copy_(saved["rows"])

    def drop_staged(self) -> None:
        super().drop_staged()
        if self._ready is not None:
            self._ready.drop_staged()

    def _done_mask(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self._done), dtype=torch.bool)
