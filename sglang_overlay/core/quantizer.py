# SPDX-License-Identifier: Apache-2.0
"""What turns a complete unit into fp8 values and scales, and what kernels need of the memory they read.

All quantizers write into slices of the final parameter. A unit's pieces are disjoint and cover it; they have the
parameter's high-precision dtype and are on its device or on the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from sglang_overlay.core.regions import slices
from sglang_overlay.core.staging import Piece


def made_current(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the thread's current one, where kernels are launched; new threads start with the first device."""
    if device.type in ("cpu", "meta"):
        return nullcontext()
    module = torch.get_device_module(device)
    return module.device(device) if module.is_initialized() else nullcontext()


class Quantizer(Protocol):
    """Quantizes units of one parameter. Several threads may call it at once, for different units."""

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | float:
        """Quantize one unit.

        Args:
            pieces: the unit's values.
            weight: fp8 output, with the unit's shape.
            scale: float32 output, ``[S]``: the unit's scales in row-major order, or ``[]`` for a single one.

        Returns:
            The unit's largest magnitude; NaN or Inf if any of its values is. May be on the device, not awaited.
        """

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Quantize several whole units at once.

        Args:
            values: high precision, ``[n, *unit]``.
            weight: fp8 output, ``[n, *unit]``.
            scale: float32 output, ``[n, S]``, or ``[n]`` where a unit has a single scale.

        Returns:
            Largest magnitudes, ``[n]``, as ``quantize`` returns them.
        """


def assemble(pieces: Sequence[Piece], like: torch.Tensor) -> torch.Tensor:
    """One contiguous high-precision unit with ``like``'s shape and device. Copies only if that is necessary."""
    if len(pieces) == 1 and pieces[0].values.shape == like.shape:
        return pieces[0].values.to(like.device).contiguous()
    unit = torch.empty(like.shape, dtype=pieces[0].values.dtype, device=like.device)
    for piece in pieces:
        unit[slices(piece.box)].copy_(piece.values)
    return unit


def aligned(values: torch.Tensor) -> torch.Tensor:
    """``values`` as kernels need them: contiguous, and aligned to 16 bytes.

    A view of another tensor's memory may begin at any address, and an unaligned 16-byte load is a fault.
    """
    values = values.contiguous()
    # Fake tensors have no address.
    is_real = type(values) in (torch.Tensor, torch.nn.Parameter)
    return values.clone() if is_real and values.data_ptr() % _LOADED_BYTES else values


_LOADED_BYTES = 16
