# SPDX-License-Identifier: Apache-2.0
"""Take values that a trainer has quantized itself, and their scales, into a parameter unchanged, bit for bit."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from sglang_overlay.core import row_runs
from sglang_overlay.core.regions import Box, difference, slices
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.core.stream import Storage
from sglang_overlay.core.units import TargetRegion, TargetRegions, UnitGrid
from sglang_overlay.errors import UnsupportedWriteError, WeightUpdateError
from sglang_overlay.update.undo import UndoLog
from sglang_overlay.update.update_capture import dtype_name

EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)
"""Dtypes of powers of two that are sent as their exponents (UE8M0, OCP Microscaling Formats 1.0)."""


def as_served(name: str, scales: torch.Tensor, served: torch.dtype) -> torch.Tensor:
    """Scales in the dtype in which they are served, where exponents were sent.

    Raises:
        WeightUpdateError: the scales are packed for a kernel.
    """
    if scales.dtype is torch.int32:
        raise WeightUpdateError(
            f"{name} holds int32, as DeepGEMM packs four exponents for its own kernel. Send one scale a block, as "
            "float32 or as UE8M0 exponents (uint8, float8_e8m0fnu)"
        )
    if scales.dtype not in EXPONENTS or scales.dtype is served:
        return scales
    # Casting would take an exponent for the scale itself.
    return scales.view(torch.uint8) if served is torch.uint8 else scales.view(torch.float8_e8m0fnu).to(served)


@dataclass(frozen=True, eq=False)
class _Write:
    """Quantized values for ``region``, beginning in unit ``first``."""

    first: int
    region: TargetRegion
    values: torch.Tensor

    @property
    def units(self) -> slice:
        return slice(self.first, self.first + self.region.count)


class ReadyValues:
    """Holds quantized values and scales of one parameter until units have all of both; then replaces these units.

    Any thread may write, which holds ``_lock``. Everything else may be called only while no loader runs.

    Args:
        name: of the parameter, for messages.
        grid: how the parameter divides into units.
        storage: its final memory; scales are ``[units]`` or ``[units, scales]``.
        scale: the placeholder of the scales, in the order of the storage's. It may have several per served scale: one
            for each part of a fused weight that is served with one scale.
        scale_name: of that placeholder, for messages.
        undo: keeps replaced values.
        account: counts waiting values.

    Attributes:
        name: ``scale_name``, since as a ``WriteSink`` this takes the writes to the scales' placeholder.
    """

    def __init__(
        self,
        name: str,
        grid: UnitGrid,
        storage: Storage,
        scale: torch.Tensor,
        scale_name: str,
        undo: UndoLog,
        account: StagingAccount,
    ) -> None:
        self.name = scale_name
        self._parameter = name
        self._grid = grid
        self._regions = TargetRegions(grid)
        self._storage = storage
        self._undo = undo
        self._account = account
        self._lock = threading.Lock()
        self._waiting: list[_Write] = []
        self._missing: dict[int, list[Box]] = {}
        self._parts = scale.numel() // storage.scale.numel()
        self._scale = torch.zeros(scale.numel(), dtype=storage.scale.dtype, device=storage.scale.device)
        self._scaled = torch.zeros(scale.numel(), dtype=torch.bool)
        self._whole = torch.zeros(grid.count, dtype=torch.bool)
        self.taken = torch.zeros(grid.count, dtype=torch.bool)
        """Units that have been replaced: bool, ``[units]``."""

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Take a write of scales: ``destination`` is a view of the scales' placeholder.

        Raises:
            WeightUpdateError: the parts of a fused weight have different scales.
        """
        view = destination.size(), destination.stride(), destination.storage_offset()
        with self._lock, torch.inference_mode(mode=False), torch.no_grad():
            self._scale.as_strided(*view).copy_(source)
            self._scaled.as_strided(*view).fill_(True)
            self._replace()

    def write_values(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Take a write of quantized values: ``destination`` is a view of the values' placeholder.

        Raises:
            UnsupportedWriteError: the view is not a box of the parameter.
            WeightUpdateError: the parts of a fused weight have different scales.
        """
        try:
            first, region = self._regions.of(destination)
        except UnsupportedWriteError as refused:
            for part in row_runs.split(self._grid, destination, source, refused):
                self.write_values(*part)
            return
        with self._lock, torch.inference_mode(mode=False), torch.no_grad():
            # The sender may reuse the tensor's memory.
            values = region.lay_out(source).to(self._storage.weight.device, copy=True)
            write = _Write(first, region, values)
            self._account.add(values.nbytes)
            self._waiting.append(write)
            self._cover(write)
            self._replace()

    @property
    def open_units(self) -> torch.Tensor:
        """Units with some, but not all, of their values and scales: bool, ``[units]``."""
        found = self._whole | self._scaled.view(self._grid.count, -1).any(1)
        found[list(self._missing)] = True
        return found

    @property
    def problem(self) -> str | None:
        """A message about units that are incomplete; None if there are none."""
        left = self.open_units
        if not left.any():
            return None
        return (
            f"{self._parameter} ({int(left.sum())} of {self._grid.count} units: "
            f"{dtype_name(self._storage.weight.dtype)} values without their scales in "
            f"{self.name.rpartition('.')[2]}, or the reverse)"
        )

    def saved(self) -> tuple[object, ...]:
        """A snapshot for ``restore``."""
        missing = {unit: list(boxes) for unit, boxes in self._missing.items()}
        tensors = (self._scale.clone(), self._scaled.clone(), self._whole.clone(), self.taken.clone())
        return list(self._waiting), missing, tensors

    def restore(self, saved: tuple[object, ...]) -> None:
        """Go back to the state at the time of ``saved``."""
        self.drop_staged()
        self._waiting, self._missing, (self._scale, self._scaled, self._whole, self.taken) = saved  # type: ignore[assignment,misc]
        self._account.add(sum(write.values.nbytes for write in self._waiting))

    def drop_staged(self) -> None:
        """Forget values that wait for their scales, and scales that wait for their values."""
        self._account.add(-sum(write.values.nbytes for write in self._waiting))
        self._waiting = []
        self._missing = {}
        self._whole.fill_(False)
        self._scaled.fill_(False)

    def _cover(self, write: _Write) -> None:
        if write.region.is_whole:
            self._whole[write.units] = True
            return
        for unit in range(write.units.start, write.units.stop):
            boxes = self._missing.get(unit, [self._grid.full])
            self._missing[unit] = [part for box in boxes for part in difference(box, write.region.box)]
            self._whole[unit] |= not self._missing[unit]

    def _replace(self) -> None:
        """Replace the units that now have all of their values and scales."""
        ready = self._whole & self._scaled.view(self._grid.count, -1).all(1)
        done = [write for write in self._waiting if bool(ready[write.units].all())]
        if not done:
            return
        if self._parts > 1:
            for write in done:
                self._refuse_different(self._scales_of(write))
        self._waiting = [write for write in self._waiting if write not in done]
        for write in done:
            self._write(write)
            self.taken[write.units] = True
            self._account.add(-write.values.nbytes)
        # Later values and scales for these units are a new set.
        for write in done:
            self._whole[write.units] = False
            self._scaled.view(self._grid.count, -1)[write.units] = False
            for unit in range(write.units.start, write.units.stop):
                self._missing.pop(unit, None)

    def _write(self, write: _Write) -> None:
        weight, scale = self._storage.weight[write.units], self._storage.scale[write.units]
        self._undo.keep(weight, scale)
        box = slices(write.region.box)
        if write.region.count == 1:
            weight[0][box].copy_(write.values)
        else:
            weight[(slice(None), *box)].copy_(write.values)
        scale.copy_(self._scales_of(write)[..., 0].reshape(scale.shape))

    def _scales_of(self, write: _Write) -> torch.Tensor:
        """The scales received for a write's units: ``[units, served scales of a unit, parts]``."""
        return self._scale.view(self._grid.count, -1, self._parts)[write.units]

    def _refuse_different(self, scales: torch.Tensor) -> None:
        if not (scales == scales[..., :1]).all():
            found = ", ".join(f"{scale:.6g}" for scale in scales.flatten().unique().tolist())
            raise WeightUpdateError(
                f"{self._parameter} is served with one scale for all of its parts, and they came with {found}. "
                "Quantize them with one scale, or send them in high precision"
            )
