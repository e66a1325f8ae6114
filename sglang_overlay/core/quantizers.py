# SPDX-License-Identifier: Apache-2.0
"""Turn complete units into fp8 values and scales.

All quantizers write into slices of the final parameter. Pieces of a unit are disjoint and cover it; they have the
parameter's high-precision dtype and lie on its device or on the host.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, Protocol

import torch

from sglang_overlay.core.regions import slices
from sglang_overlay.core.staging import Piece

Reorder = Callable[[torch.Tensor], torch.Tensor]
"""Puts a tensor's elements into another order; its shape stays."""


def made_current(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the thread's current one: kernels are launched there, and loader threads begin with the first."""
    if device.type in ("cpu", "meta"):
        return nullcontext()
    module = torch.get_device_module(device)
    return module.device(device) if module.is_initialized() else nullcontext()


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
    return magnitudes(unit.reshape(1, -1) if unit.ndim == 0 else unit.unsqueeze(0))[0]


def magnitudes(units: torch.Tensor) -> torch.Tensor:
    """As ``magnitude``, of each of some units ``[n, ...]``. One kernel on a device; on a CPU a norm is slower."""
    if units.is_cpu:
        flat = units.flatten(1)
        return torch.maximum(flat.amin(1).neg(), flat.amax(1))
    dimensions = tuple(range(1, units.ndim))
    largest: torch.Tensor = torch.linalg.vector_norm(units, torch.inf, dim=dimensions)
    return largest


class Magnitudes:
    """The largest magnitude of each unit of a parameter; 0 where it has not been quantized.

    Any thread may note; different threads note different units.

    Args:
        units: how many.
        device: where quantizers leave what they do not await.

    Attributes:
        found: float32, ``[units]``.
    """

    def __init__(self, units: int, device: torch.device) -> None:
        self.found = torch.zeros(units, dtype=torch.float32, device=device)
        # Setting one element through torch takes as long as quantizing a small unit.
        self._numbers = self.found.numpy() if self.found.is_cpu else None

    def note(self, unit: int, found: torch.Tensor | float) -> None:
        """Note a unit's, which may be on the device and not there yet."""
        if self._numbers is not None and isinstance(found, float):
            self._numbers[unit] = found
        else:
            self.found[unit] = found

    def note_run(self, units: slice, found: torch.Tensor) -> None:
        """Note those of several units."""
        self.found[units] = found


def units_not_finite(magnitudes: Sequence[torch.Tensor]) -> list[list[int]]:
    """Of each of these magnitudes of units, which are NaN or Inf. Waits for each device once, for all of them."""
    found: list[list[int]] = [[] for _ in magnitudes]
    for device in {each.device for each in magnitudes}:
        here = [number for number, each in enumerate(magnitudes) if each.device == device]
        places = [(number, unit) for number in here for unit in range(magnitudes[number].numel())]
        is_damaged = ~torch.isfinite(torch.cat([magnitudes[number].detach().view(-1) for number in here]))
        for place in is_damaged.nonzero().flatten().tolist():
            number, unit = places[place]
            found[number].append(unit)
    return found


def assemble(pieces: Sequence[Piece], like: torch.Tensor) -> torch.Tensor:
    """One contiguous high-precision unit, of ``like``'s shape and device; a single piece that is one is not copied."""
    if len(pieces) == 1 and pieces[0].values.shape == like.shape:
        return pieces[0].values.to(like.device).contiguous()
    unit = torch.empty(like.shape, dtype=pieces[0].values.dtype, device=like.device)
    for piece in pieces:
        unit[slices(piece.box)].copy_(piece.values)
    return unit


def aligned(values: torch.Tensor) -> torch.Tensor:
    """``values`` as kernels take them: contiguous, and where loads of 16 bytes may begin.

    A view of a flattened bucket may begin at any address, and such a load at another one is a fault.
    """
    values = values.contiguous()
    # Fake tensors have no address.
    is_real = type(values) in (torch.Tensor, torch.nn.Parameter)
    return values.clone() if is_real and values.data_ptr() % _LOADED_BYTES else values


_LOADED_BYTES = 16


class AssembledUnits(ABC):
    """Units that are quantized from contiguous memory: one that came in pieces is put together first.

    Attributes:
        at_once: elements quantized in one go, or one unit where that has more; bounds the memory for intermediates.
    """

    at_once: ClassVar[int] = 1 << 27

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As of ``UnitQuantizer``."""
        unit = assemble(pieces, weight)
        return self.quantize_run(unit.unsqueeze(0), weight.unsqueeze(0), scale.unsqueeze(0))[0]

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As of ``UnitQuantizer``."""
        units = max(1, self.at_once * len(values) // values.numel())
        if len(values) <= units:
            return self.quantize_units(values, weight, scale)
        parts = zip(values.split(units), weight.split(units), scale.split(units), strict=True)
        return torch.cat([self.quantize_units(*part) for part in parts])

    @abstractmethod
    def quantize_units(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As ``quantize_run``, in one go: on a device each operation is a launch, whatever the number of units."""


class OneScaleAUnit:
    """Units of fp8 values with a single scale."""

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        return is_rounding_of(weight[slices(piece.box)], scale, piece.values)


def is_rounding_of(weight: torch.Tensor, scale: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether fp8 ``weight`` times ``scale`` (broadcast against it) is ``values``, rounded: within half a step."""
    wanted = values.float()
    # Half a step: 2**-4 of the value for e4m3, or of the smallest normal number below that.
    smallest = torch.finfo(weight.dtype).smallest_normal * scale
    allowed = torch.maximum(wanted.abs(), smallest) * (torch.finfo(weight.dtype).eps / 2)
    return not bool(((weight.float() * scale - wanted).abs() > allowed * 1.01).any())


class WholeUnitQuantizer(AssembledUnits, OneScaleAUnit):
    """Runs a kernel on each whole unit, for those that only take one contiguous matrix.

    Args:
        function: ``unit -> (fp8 values, float32 scale)``, upstream's own.
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
    """Per-channel: every row has its own scale, so any run of units is one call, of a row or of several each.

    Args:
        function: ``[rows, columns] -> (fp8 [rows, columns], float32 scale of one element a row)``.
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
    """Rows by upstream's kernel, with the bits that it gives the whole weight, whatever the pieces.

    Which kernel that is depends on the number of rows. ``launch_per_token_quant_fp8`` of SGLang 0.5.19 to 0.5.23
    (``kernels/jit/csrc/gemm/per_token_quant_fp8.cuh``) and ``sgl_per_token_quant_fp8`` of 0.5.17
    (``sgl-kernel/csrc/gemm/per_token_quant_fp8.cu``) give a row to a warp from 16 rows a multiprocessor on, and to a
    thread block below that. Both store ``absmax / 448`` as the scale and multiply by its reciprocal. They differ where
    the scale is 0: the warp's kernel multiplies by 0, the block's by infinity, and ``fminf`` makes 448 of a NaN. The
    number of columns chooses how wide loads are, and no bit. In 0.5.13 and 0.5.15 there is one kernel, whose absmax is
    at least 1e-10, and Triton's, on other platforms, has that floor as well.

    Args:
        function: upstream's ``per_token_group_quant_fp8``, called with rows and their length.
        rows: of the whole weight.
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
        """Give rows of scale 0 the values that they have where the whole weight is quantized at once."""
        if self._zeros_stay is None:
            self._zeros_stay = self._whole_keeps_zeros(rows)
        is_redone = (scale.view(-1, 1) == 0) & self._zeros_stay
        zeros = (rows * 0).nan_to_num_(nan=torch.finfo(weight.dtype).max).to(weight.dtype)
        found = weight.view(torch.uint8)
        torch.where(is_redone, zeros.view(torch.uint8), found, out=found)

    def _whole_keeps_zeros(self, like: torch.Tensor) -> torch.Tensor:
        """Whether a row of zeros in the whole weight stays one. Asked of upstream itself, on the device; not awaited.

        A few columns are enough, as many beyond a multiple of 16 as the weight has: that chooses the kernel's loads.
        """
        quantized, _ = self._function(like.new_zeros(self._rows, 16 + like.shape[-1] % 16))
        return quantized.view(torch.uint8)[0, 0] == 0


class ShuffledUnits(AssembledUnits):
    """Stores what another quantizer makes of units in the order in which a kernel reads them.

    Args:
        quantizer: of these units, rows one after the other.
        shuffle: from that order into the kernel's, each unit within itself: ``[n, rows, columns]``.
        unshuffle: back.
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
