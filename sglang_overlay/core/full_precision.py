# SPDX-License-Identifier: Apache-2.0
"""A parameter that upstream reads in high precision before it is quantized: collected behind its placeholder."""

from __future__ import annotations

import threading

import torch

from sglang_overlay.core.placeholders import materialize
from sglang_overlay.core.regions import Box, Placement, difference, slices, whole


class FullPrecisionParameter:
    """Takes the writes to a placeholder; once all of it has been written, the placeholder itself holds the values.

    References taken before the loaders ran see the values as well. Any thread may write, which holds ``_lock``.
    Everything else may be called only while no loader runs.

    Args:
        name: for messages.
        placeholder: the meta parameter that upstream's loader writes to.
        device: where the values are allocated, in the placeholder's dtype.
    """

    def __init__(self, name: str, placeholder: torch.nn.Parameter, device: torch.device) -> None:
        self.name = name
        self._placeholder = placeholder
        self._shape = placeholder.shape
        self._dtype = placeholder.dtype
        self._device = device
        self._lock = threading.Lock()
        self._values: torch.Tensor | None = None
        self._swapped: torch.nn.Parameter | None = None
        self._missing: list[Box] = [whole(self._shape)]

    def write(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Take a write of ``source`` to the view ``destination`` of the placeholder. Shapes are equal.

        Raises:
            UnsupportedWriteError: the view is not a box of the parameter.
        """
        if not destination.numel():
            return
        placement = Placement(destination, self._shape)
        with self._lock, torch.inference_mode(mode=False), torch.no_grad():
            if self._values is None:
                self._values = torch.empty(self._shape, dtype=self._dtype, device=self._device)
            self._values[slices(placement.box)].copy_(placement.lay_out(source))
            self._missing = [part for box in self._missing for part in difference(box, placement.box)]
            if not self._missing and self._swapped is None:
                self._swapped = materialize(self._placeholder, self._values)

    @property
    def values(self) -> torch.Tensor | None:
        """The parameter in high precision once all of it has been written, else None."""
        return None if self._missing else self._values

    @property
    def is_partial(self) -> bool:
        """Whether some of the parameter has been written, but not all."""
        return self._values is not None and bool(self._missing)

    def saved(self) -> tuple[torch.Tensor, list[Box]] | None:
        """A snapshot for ``restore``; None if nothing has been written."""
        return None if self._values is None else (self._values.clone(), list(self._missing))

    def restore(self, saved: tuple[torch.Tensor, list[Box]] | None) -> None:
        """Go back to the state at the time of ``saved``."""
        self.reset()
        if saved is not None:
            self._values, self._missing = saved[0], list(saved[1])
            if not self._missing:
                self._swapped = materialize(self._placeholder, self._values)

    def reset(self) -> None:
        """Forget the values; the placeholder has no memory again."""
        if self._swapped is not None:
            torch.utils.swap_tensors(self._placeholder, self._swapped)
        self._swapped = self._values = None
        self._missing = [whole(self._shape)]
