# SPDX-License-Identifier: Apache-2.0
"""Scales of whole rows for a parameter that holds only some columns of them, as row-parallel layers do at TP above 1.

Weight loaders get whole checkpoint tensors and narrow them to the rank's columns themselves. So each rank sees whole
rows while it loads, and can compute their largest magnitudes without communication.
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
    """The tensor that each thread's current loader call was given; None unless it was exactly one."""

    def __init__(self) -> None:
        self._thread = threading.local()

    @property
    def value(self) -> torch.Tensor | None:
        """This thread's tensor."""
        return getattr(self._thread, "value", None)

    def wrap(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        """Upstream's loader, wrapped so that ``value`` is the tensor it was given."""

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

    Any thread may write; the entries of a unit's rows belong to the thread that has claimed the unit.

    Args:
        loaded: the tensor that the parameter's loader was given.
        columns: number of columns of a whole row.
        grid: how the parameter divides into units.
        dtype: the parameter's high-precision dtype.

    Attributes:
        found: largest magnitudes, ``[units, *rows of a unit]``, of ``dtype``, on the host; 0 for unwritten rows.
        is_narrowed: whether some values came without the rest of their rows; for those, only these values count.
    """

    def __init__(self, loaded: LoadedTensor, columns: int, grid: UnitGrid, dtype: torch.dtype) -> None:
        self.found = torch.zeros(grid.parameter_shape[:-1], dtype=dtype)
        self.is_narrowed = False
        self._loaded = loaded
        # For a padded row the checkpoint has fewer columns, but at least one for each rank.
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
        """This thread has claimed ``units``, and is about to write what it has passed to ``see``."""
        if self._thread.seen is not None:
            first, region, found = self._thread.seen
            part = found if region.count == 1 else found[units.start - first : units.stop - first]
            self.found[(slice(units.start, units.stop), *slices(region.box[:-1]))] = part

    def _whole(self, values: torch.Tensor, source: torch.Tensor) -> torch.Tensor | None:
        """The whole rows that contain ``values`` (``source`` in the parameter's layout); None if unknown."""
        given = self._loaded.value
        if given is None or not given.ndim or not _is_high_precision(given):
            return None
        if storage_key(given) == storage_key(source):
            rows = _widened(values, given)
        elif given.shape[:-1] == source.shape[:-1]:
            # The loader padded it, or copied it before moving it to a device.
            rows = given.reshape(*values.shape[:-1], given.shape[-1])
        else:
            rows = None
        return rows if rows is not None and rows.shape[-1] >= self._least else None


def _is_high_precision(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.itemsize > 1


def _widened(values: torch.Tensor, given: torch.Tensor) -> torch.Tensor | None:
    """``values``, a view of ``given``, widened to the full extent of ``given`` along their last dimension."""
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
    """Largest magnitude in each row: ``[..., columns] -> [...]``, of the same dtype; NaN if any value is."""
    return magnitudes(rows, rows.ndim - 1)


class WholeRowsQuantizer(AssembledUnits):
    """Appends the largest magnitude of each whole row as extra columns, quantizes, and cuts those columns off.

    So scales and values have the same bits as if the whole row had been quantized, whatever the quantizer's arithmetic.
    Returned magnitudes are of whole rows as well, so every rank reports a NaN.

    Args:
        quantizer: quantizes units with one scale per row.
        rows: magnitudes of the whole rows.
        scale: of the whole parameter, contiguous; a unit's offset in it identifies its rows.
    """

    columns = 16
    """A multiple of what kernels load at once, so that the parameter's own columns stay as aligned as they were."""

    def __init__(self, quantizer: UnitQuantizer, rows: WholeRows, scale: torch.Tensor) -> None:
        self.quantizer = quantizer
        self._rows = rows
        self._scale = scale
        self._start = scale.storage_offset()

    def over(self, quantizer: UnitQuantizer) -> WholeRowsQuantizer:
        """The same around another quantizer."""
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
