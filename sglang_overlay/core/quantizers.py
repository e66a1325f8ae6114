# SPDX-License-Identifier: Apache-2.0
"""Quantizers over upstream's functions and kernels, and the largest magnitude of each unit."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch

from sglang_overlay.core.quantizer import Quantizer, aligned, assemble
from sglang_overlay.core.regions import slices
from sglang_overlay.core.staging import Piece

Reorder = Callable[[torch.Tensor], torch.Tensor]
"""Reorders a tensor's elements; the shape stays the same."""


class UnitQuantizer(Quantizer, Protocol):
    """A ``Quantizer`` that can tell whether values belong to what it has quantized."""

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether a unit that was quantized to ``weight`` and ``scale`` can have contained ``piece``.

        Args:
            piece: high-precision values of a box of the unit.
            weight: fp8, with the unit's shape.
            scale: float32, the unit's slice of the scale.
        """


def magnitude(unit: torch.Tensor) -> torch.Tensor:
    """Largest magnitude; NaN or Inf if any value is. Scales do not show that: the kernels' maximum drops NaN."""
    if unit.is_cpu:
        # One pass in all threads: torch reduces along a dimension in one.
        least, largest = torch.aminmax(unit)
        return torch.maximum(largest, least.neg())
    return magnitudes(unit.reshape(1, -1) if unit.ndim == 0 else unit.unsqueeze(0))[0]


def magnitudes(units: torch.Tensor, batch: int = 1) -> torch.Tensor:
    """Like ``magnitude``, for each unit: ``[*b, ...] -> [*b]``. One kernel on a device; on a CPU a norm is slower.

    Args:
        units: to look at.
        batch: number of leading dimensions that count units.
    """
    if units.is_cpu:
        flat = units.flatten(batch)
        return torch.maximum(flat.amin(-1).neg(), flat.amax(-1))
    dimensions = tuple(range(batch, units.ndim))
    largest: torch.Tensor = torch.linalg.vector_norm(units, torch.inf, dim=dimensions)
    return largest


class Magnitudes:
    """The largest magnitude of each unit of a parameter; 0 if it has not been quantized.

    Any thread may note; different threads note different units.

    Args:
        units: number of units.
        device: where quantizers leave magnitudes that they do not await.

    Attributes:
        found: float32, ``[units]``.
    """

    def __init__(self, units: int, device: torch.device) -> None:
        self.found = torch.zeros(units, dtype=torch.float32, device=device)
        # Setting one element through torch takes as long as quantizing a small unit.
        self._numbers = self.found.numpy() if self.found.is_cpu else None

    def note(self, unit: int, found: torch.Tensor | float) -> None:
        """Note a unit's magnitude, which may still be being computed on the device."""
        if self._numbers is not None and isinstance(found, float):
            self._numbers[unit] = found
        else:
            self.found[unit] = found

    def note_run(self, units: slice, found: torch.Tensor) -> None:
        """Note the magnitudes of several units, ``[n]``."""
        self.found[units] = found


def units_not_finite(magnitudes: Sequence[torch.Tensor]) -> list[list[int]]:
    """For each tensor of unit magnitudes, the units that are NaN or Inf. Waits for each device once."""
    found: list[list[int]] = [[] for _ in magnitudes]
    for device in {each.device for each in magnitudes}:
        here = [number for number, each in enumerate(magnitudes) if each.device == device]
        places = [(number, unit) for number in here for unit in range(magnitudes[number].numel())]
        is_damaged = ~torch.isfinite(torch.cat([magnitudes[number].detach().view(-1) for number in here]))
        for place in is_damaged.nonzero().flatten().tolist():
            number, unit = places[place]
            found[number].append(unit)
    return found


class AssembledUnits(ABC):
    """Quantizes units from contiguous memory: a unit in pieces is assembled first.

    Attributes:
        at_once: elements quantized in one call, but at least one unit; bounds the memory for intermediates.
    """

    at_once: ClassVar[int] = 1 << 27

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As of ``Quantizer``."""
        unit = assemble(pieces, weight)
        return self.quantize_run(unit.unsqueeze(0), weight.unsqueeze(0), scale.unsqueeze(0))[0]

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As of ``Quantizer``."""
        units = max(1, self.at_once * len(values) // values.numel())
        if len(values) <= units:
            return self.quantize_units(values, weight, scale)
        parts = zip(values.split(units), weight.split(units), scale.split(units), strict=True)
        return torch.cat([self.quantize_units(*part) for part in parts])

    @abstractmethod
    def quantize_units(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Like ``quantize_run``, in as few operations as possible: on a device each operation is a launch.

        The planner runs it on tensors without data for ``--device cuda``: nothing may be read from the device.
        """


class OneScaleAUnit:
    """Mixin for quantizers whose units have a single scale."""

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        part = weight[slices(piece.box)]
        return is_rounding_of(part, scale, piece.values) and self._has_largest(piece, part, weight, scale)

    @staticmethod
    def _has_largest(piece: Piece, part: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether ``piece`` reaches the magnitude of which the scale was made, or may have it elsewhere in its unit."""
        top = torch.finfo(weight.dtype).max
        inside, everywhere = ((values.float().abs() == top).sum() for values in (part, weight))
        if not inside or inside < everywhere:
            return True
        return bool((piece.values.float().abs().amax() >= scale * top * (1 - _ROUNDED)).all())


_ROUNDED = 2.0**-20
"""More than a scale differs by from the magnitude of which it was made, divided by the largest fp8 value."""


def is_rounding_of(weight: torch.Tensor, scale: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether fp8 ``weight`` times ``scale`` (broadcast against it) is ``values`` rounded.

    Then they differ by half a step at most, and no value is larger than what the scale was made for.
    """
    wanted = values.float()
    if bool((wanted.abs() > scale * torch.finfo(weight.dtype).max * (1 + _ROUNDED)).any()):
        return False
    # Half a step: 2**-4 of the value for e4m3, or of the smallest normal number below that.
    smallest = torch.finfo(weight.dtype).smallest_normal * scale
    allowed = torch.maximum(wanted.abs(), smallest) * (torch.finfo(weight.dtype).eps / 2)
    return not bool(((weight.float() * scale - wanted).abs() > allowed * 1.01).any())


class WholeUnitQuantizer(AssembledUnits, OneScaleAUnit):
    """Runs a kernel on each unit, for kernels that only take one contiguous matrix.

    Args:
        function: upstream's ``unit -> (fp8 values, float32 scale)``.
    """

    def __init__(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.function = function

    def quantize_units(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        for unit, out, factor in zip(values, weight, scale, strict=True):
            quantized, unit_scale = self.function(aligned(unit))
            out.copy_(quantized)
            factor.copy_(unit_scale.reshape(factor.shape))
        return magnitudes(values)


class RowQuantizer(AssembledUnits):
    """Per-channel: every row has its own scale, so one call quantizes any run of units, with one or several rows each.

    Args:
        function: ``[rows, columns] -> (fp8 [rows, columns], float32 scale with one element per row)``.
    """

    def __init__(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._function = function

    def quantize_units(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        self._quantize_rows(values.reshape(-1, values.shape[-1]), weight.view(-1, values.shape[-1]), scale)
        return magnitudes(values)

    def _quantize_rows(self, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
        quantized, factors = self._function(rows.contiguous())
        weight.copy_(quantized)
        scale.copy_(factors.reshape(scale.shape))

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        factors = scale.reshape(*weight.shape[:-1], 1).expand(weight.shape)[slices(piece.box)]
        return is_rounding_of(weight[slices(piece.box)], factors, piece.values)


class RowKernelQuantizer(RowQuantizer):
    """Quantizes rows with upstream's kernel, to the bits it gives for the whole weight, whatever the pieces.

    Upstream picks a kernel by the number of rows. ``launch_per_token_quant_fp8`` of SGLang 0.5.19 to 0.5.23
    (``kernels/jit/csrc/gemm/per_token_quant_fp8.cuh``) and ``sgl_per_token_quant_fp8`` of 0.5.17
    (``sgl-kernel/csrc/gemm/per_token_quant_fp8.cu``) assign each row to a warp from 16 rows per multiprocessor on, and
    to a thread block below that. Both store ``absmax / 448`` as the scale and multiply by its reciprocal. They differ
    where the scale is 0: the warp's kernel multiplies by 0, the block's by infinity, and ``fminf`` turns the NaN into
    448. The number of columns changes the width of loads, but no bit. 0.5.13 and 0.5.15 have one kernel, whose absmax
    is at least 1e-10; Triton's, on other platforms, has the same floor.

    Args:
        function: upstream's ``per_token_group_quant_fp8``, called with rows and their length.
        rows: number of rows of the whole weight.
    """

    def __init__(self, function: Callable[..., tuple[torch.Tensor, torch.Tensor]], rows: int) -> None:
        super().__init__(lambda values: function(values, values.shape[-1]))
        self.kernel = function
        self._rows = rows
        self._writes_in_place = {"output_q", "output_s"} <= inspect.signature(function).parameters.keys()
        self._zeros_stay: torch.Tensor | None = None

    def _quantize_rows(self, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
        rows = aligned(rows)
        if self._writes_in_place:
            self.kernel(rows, rows.shape[-1], output_q=weight, output_s=scale.view(-1, 1))
        else:
            super()._quantize_rows(rows, weight, scale)
        if len(rows) < self._rows:
            self._redo_zeros(rows, weight, scale)

    def _redo_zeros(self, rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
        """Give rows of scale 0 the values they get when the whole weight is quantized at once."""
        if self._zeros_stay is None:
            self._zeros_stay = self._whole_keeps_zeros(rows)
        is_redone = (scale.view(-1, 1) == 0) & self._zeros_stay
        zeros = (rows * 0).nan_to_num_(nan=torch.finfo(weight.dtype).max).to(weight.dtype)
        found = weight.view(torch.uint8)
        torch.where(is_redone, zeros.view(torch.uint8), found, out=found)

    def _whole_keeps_zeros(self, like: torch.Tensor) -> torch.Tensor:
        """Whether a row of zeros in the whole weight stays zero. Runs upstream's kernel to find out; not awaited.

        A few columns are enough, with the weight's remainder modulo 16: that selects the width of the kernel's loads.
        """
        quantized, _ = self._function(like.new_zeros(self._rows, 16 + like.shape[-1] % 16))
        return quantized.view(torch.uint8)[0, 0] == 0


class ShuffledUnits(AssembledUnits):
    """Stores another quantizer's results in the order in which a kernel reads them.

    Args:
        quantizer: quantizes these units in row-major order.
        shuffle: reorders each unit of ``[n, rows, columns]`` from row-major into the kernel's order.
        unshuffle: the inverse of ``shuffle``.
    """

    def __init__(self, quantizer: UnitQuantizer, shuffle: Reorder, unshuffle: Reorder) -> None:
        self._quantizer = quantizer
        self._shuffle = shuffle
        self._unshuffle = unshuffle

    def quantize_units(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        # Not in place: a kernel may be reading the weight.
        in_rows = torch.empty_like(weight)
        found = self._quantizer.quantize_run(values, in_rows, scale)
        weight.copy_(self._shuffle(in_rows))
        return found

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        """As of ``UnitQuantizer``."""
        return self._quantizer.could_be(piece, self._unshuffle(weight.unsqueeze(0))[0], scale)
