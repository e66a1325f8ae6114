# SPDX-License-Identifier: Apache-2.0
"""Scales of whole rows for a parameter that holds only some columns of them, as row-parallel layers do at TP above 1.

Weight loaders are given whole checkpoint tensors and narrow them to the rank's columns themselves. So each rank sees
whole rows while it loads, and has to ask no other for their largest magnitudes.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from math import prod
from typing import Any

import torch

from sglang_overlay.core.capture import storage_key
from sglang_overlay.core.quantizers import AssembledUnits, UnitQuantizer, magnitudes
from sglang_overlay.core.regions import slices
from sglang_overlay.core.staging import Piece
from sglang_overlay.core.units import TargetRegion, UnitGrid


class LoadedTensor:
    """The tensor that the loader call under way was given, in each thread; None where it was not exactly one."""

    def __init__(self) -> None:
        self._thread = threading.local()

    @property
    def value(self) -> torch.Tensor | None:
        """This thread's."""
        return getattr(self._thread, "value", None)

    def wrap(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        """Upstream's loader, with it noted what it was given."""

        @functools.wraps(loader)
        def load(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            given = [value for value in tensors if not value.is_meta]
            self._thread.value = given[0] if len(given) == 1 else None
            try:
                return loader(*args, **kwargs)
            finally:
                self._thread.value = None

        return load


class WholeRows:
    """The largest magnitude of each row of the checkpoint, for a parameter that holds some of the columns.

    Any thread may write; what is found of a unit's rows belongs to who has claimed the unit.

    Args:
        loaded: what the parameter's loader was given.
        columns: of a whole row.
        grid: how the parameter divides into units.
        dtype: high precision, of the parameter.

    Attributes:
        found: ``[units, *rows of a unit]``, on the host; 0 where nothing has come.
        is_narrowed: some values came without the rest of their rows, so only they have been looked at.
    """

    def __init__(self, loaded: LoadedTensor, columns: int, grid: UnitGrid, dtype: torch.dtype) -> None:
        self.found = torch.zeros(grid.parameter_shape[:-1], dtype=dtype)
        self.is_narrowed = False
        self._loaded = loaded
        # Of a row that is padded, the checkpoint has fewer columns, but some of each rank's.
        self._least = columns - grid.shape[-1] + 1
        self._thread = threading.local()

    def see(self, first: int, region: TargetRegion, source: torch.Tensor) -> None:
        """This thread is about to write ``source`` to ``region``, beginning in unit ``first``."""
        self._thread.seen = None
        if not _is_high_precision(source):
            return  # Refused where it is written.
        values = region.lay_out(source)
        rows = self._whole(values, source)
        if rows is None and any(source.stride()):
            self.is_narrowed = True
            rows = values
        if rows is not None:
            self._thread.seen = first, region, row_magnitudes(rows).to("cpu", self.found.dtype)

    def note(self, units: range) -> None:
        """This thread has claimed ``units``, and goes on to write what it has shown to ``see``."""
        if self._thread.seen is not None:
            first, region, found = self._thread.seen
            part = found if region.count == 1 else found[units.start - first : units.stop - first]
            self.found[(slice(units.start, units.stop), *slices(region.box[:-1]))] = part

    def _whole(self, values: torch.Tensor, source: torch.Tensor) -> torch.Tensor | None:
        """The rows that ``values``, which are ``source`` as it lies in the parameter, are of; None where unknown."""
        given = self._loaded.value
        if given is None or not given.ndim or not _is_high_precision(given):
            return None
        if storage_key(given) == storage_key(source):
            rows = _widened(values, given)
        elif given.shape[:-1] == source.shape[:-1]:
            # Padded, or copied before it is brought to a device.
            rows = given.reshape(*values.shape[:-1], given.shape[-1])
        else:
            rows = None
        return rows if rows is not None and rows.shape[-1] >= self._least else None


def _is_high_precision(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize > 1


def _widened(values: torch.Tensor, given: torch.Tensor) -> torch.Tensor | None:
    """``values``, a view of ``given``, with all that ``given`` has along their last dimension."""
    column = values.stride(-1)
    steps = [(stride, size) for stride, size in zip(given.stride(), given.shape, strict=True) if size > 1]
    start, rest = 0, int(values.storage_offset()) - int(given.storage_offset())
    for stride, _ in sorted(steps, reverse=True):
        index, rest = divmod(rest, stride) if stride else (0, rest)
        start = index if stride == column else start
    size = dict(steps).get(column)
    if size is None or rest or start < 0:
        return None
    offset = int(values.storage_offset()) - start * column
    return values.as_strided((*values.shape[:-1], size), values.stride(), offset)


def row_magnitudes(rows: torch.Tensor) -> torch.Tensor:
    """Largest magnitude in each row of ``[..., columns]``, of the same dtype; NaN where any value is."""
    return magnitudes(rows.reshape(-1, rows.shape[-1])).view(rows.shape[:-1])


class WholeRowsQuantizer(AssembledUnits):
    """Gives a quantizer of rows the largest magnitude of each whole row as further columns, which are then cut off.

    So scales and values are the bits that it makes of the whole row, whatever its arithmetic. The magnitude that it
    returns is that of whole rows as well: every rank tells of a NaN.

    Args:
        quantizer: of units whose rows have a scale each.
        rows: the whole rows.
        scale: of the whole parameter, contiguous; where a unit's scale lies in it says which rows these are.
    """

    columns = 16
    """A multiple of what kernels load at once, so that those of the parameter stay as aligned as they were."""

    def __init__(self, quantizer: UnitQuantizer, rows: WholeRows, scale: torch.Tensor) -> None:
        self.quantizer = quantizer
        self._rows = rows
        self._scale = scale
        self._start = scale.storage_offset()

    def over(self, quantizer: UnitQuantizer) -> WholeRowsQuantizer:
        """The same, with another one in it."""
        return WholeRowsQuantizer(quantizer, self._rows, self._scale)

    def quantize_units(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        first = scale.storage_offset() - self._start
        largest = self._rows.found.view(-1)[first : first + prod(scale.shape)].to(values.device)
        further = largest.view(*values.shape[:-1], 1).expand(*values.shape[:-1], self.columns)
        wide = torch.cat([values, further], -1)
        quantized = torch.empty(wide.shape, dtype=weight.dtype, device=weight.device)
        found = self.quantizer.quantize_run(wide, quantized, scale)
        weight.copy_(quantized[..., : values.shape[-1]])
        return found

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        """As of ``UnitQuantizer``."""
        return self.quantizer.could_be(piece, weight, scale)
