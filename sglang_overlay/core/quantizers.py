# SPDX-License-Identifier: Apache-2.0
"""Turn complete units into fp8 values and scales.

All quantizers write into slices of the final parameter. Pieces of a unit are disjoint and cover it; they have the
parameter's high-precision dtype and lie on the parameter's device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from sglang_overlay.core.regions import slices
from sglang_overlay.core.staging import Piece


class UnitQuantizer(Protocol):
    """Quantizes units of one parameter. Must be safe to call from several threads for different units."""

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | float:
        """Quantize one unit.

        Args:
            pieces: the unit's values, shape of each its box.
            weight: fp8 output, shape of the unit.
            scale: float32 output, the unit's slice of the scale.

        Returns:
            The largest magnitude of the unit; NaN or Inf where any of its values is. May be on the device, not awaited.
        """

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Quantize several whole units at once.

        Args:
            values: high precision, ``[n, *unit]``.
            weight: fp8 output, ``[n, *unit]``.
            scale: float32 output, ``[n, *scales of a unit]``.

        Returns:
            Largest magnitudes, ``[n]``, as of ``quantize``.
        """

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        """Whether a unit that was quantized to ``weight`` and ``scale`` can have held ``piece``.

        Args:
            piece: high-precision values of a box of the unit.
            weight: fp8, shape of the unit.
            scale: float32, the unit's slice of the scale.
        """


def magnitude(unit: torch.Tensor) -> torch.Tensor:
    """Largest magnitude; NaN or Inf where any value is. Scales do not tell: the kernels' maximum drops NaN."""
    low, high = unit.aminmax()
    return torch.maximum(low.neg(), high)


class Magnitudes:
    """The largest magnitude of each unit of a parameter; 0 where it has not been quantized.

    Any thread may note; different threads note different units.

    Args:
        units: how many.
        device: where quantizers leave what they do not await.
    """

    def __init__(self, units: int, device: torch.device) -> None:
        self._found = torch.zeros(units, dtype=torch.float32, device=device)
        # Setting one element through torch takes as long as quantizing a small unit.
        self._numbers = self._found.numpy() if self._found.is_cpu else None

    def note(self, unit: int, found: torch.Tensor | float) -> None:
        """Note a unit's, which may be on the device and not there yet."""
        if self._numbers is not None and isinstance(found, float):
            self._numbers[unit] = found
        else:
            self._found[unit] = found

    def note_run(self, units: slice, found: torch.Tensor) -> None:
        """Note those of several units."""
        self._found[units] = found

    def not_finite(self) -> list[int]:
        """Units with NaN or Inf, in order. Waits for the device."""
        found: list[int] = (~torch.isfinite(self._found)).nonzero().flatten().tolist()
        return found


def assemble(pieces: Sequence[Piece], like: torch.Tensor) -> torch.Tensor:
    """One contiguous high-precision unit of the shape of ``like``; a single piece that is one already is not copied."""
    if len(pieces) == 1 and pieces[0].values.shape == like.shape:
        return pieces[0].values.contiguous()
    unit = torch.empty(like.shape, dtype=pieces[0].values.dtype, device=like.device)
    for piece in pieces:
        unit[slices(piece.box)].copy_(piece.values)
    return unit


class AssembledUnits(ABC):
    """Units that are quantized from one contiguous matrix each: one that came in pieces is put together first."""

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        unit = assemble(pieces, weight)
        return self.quantize_run(unit.unsqueeze(0), weight.unsqueeze(0), scale.unsqueeze(0))[0]

    @abstractmethod
    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As of ``UnitQuantizer``."""


class OneScaleAUnit:
    """Units of fp8 values with a single scale."""

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        return is_rounding_of(weight[slices(piece.box)], scale, piece.values)


def is_rounding_of(weight: torch.Tensor, scale: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether fp8 ``weight`` times ``scale`` (broadcast against it) is within half a step of e4m3 of ``values``."""
    wanted = values.float()
    # Half a step: 2**-4 of the value, or of the smallest normal number below that.
    smallest = torch.finfo(weight.dtype).smallest_normal * scale
    allowed = torch.maximum(wanted.abs(), smallest) * 2**-4
    return not bool(((weight.float() * scale - wanted).abs() > allowed * 1.01).any())


class WholeUnitQuantizer(AssembledUnits, OneScaleAUnit):
    """Runs a function on each whole unit, for kernels that only take one contiguous matrix.

    Args:
        function: ``unit -> (fp8 values, float32 scale)``, upstream's own.
    """

    def __init__(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._function = function

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        for unit, out, factor in zip(values, weight, scale, strict=True):
            quantized, unit_scale = self._function(unit.contiguous())
            out.copy_(quantized)
            factor.copy_(unit_scale.reshape(factor.shape))
        return torch.stack([magnitude(unit) for unit in values])


class RowQuantizer(AssembledUnits):
    """Per-channel: every row has its own scale, so any run of units is one call, of a row or of several each.

    Args:
        function: ``[rows, columns] -> (fp8 [rows, columns], float32 scale of one element a row)``, upstream's own.
    """

    def __init__(self, function: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._function = function

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        quantized, factors = self._function(values.reshape(-1, values.shape[-1]).contiguous())
        weight.copy_(quantized.view(weight.shape))
        scale.copy_(factors.reshape(scale.shape))
        low, high = values.flatten(1).aminmax(dim=1)
        return torch.maximum(low.neg(), high)

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        factors = scale.reshape(*weight.shape[:-1], 1).expand(weight.shape)[slices(piece.box)]
        return is_rounding_of(weight[slices(piece.box)], factors, piece.values)
