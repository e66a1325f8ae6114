# SPDX-License-Identifier: Apache-2.0
"""What a load has done so far, for its report."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_overlay.load.ranks import parallel_ranks
from sglang_overlay.observe.layer_times import LayerTimes
from sglang_overlay.observe.progress import Progress, SilentProgress, quantization_progress


@dataclass(frozen=True)
class StreamedLayer:
    """A streamed layer that is finished: its name, its units, those that came whole, and its bytes with scales."""

    name: str
    units: int
    direct_units: int
    size: int


class LoadRecord:
    """Counts what is quantized while the checkpoint is read, and shows it. Any thread may call ``quantized``.

    Attributes:
        layers: the streamed layers that are finished, in that order.
        times: when their units were quantized.
    """

    def __init__(self) -> None:
        self.layers: list[StreamedLayer] = []
        self.times = LayerTimes()
        self._progress: Progress = SilentProgress()

    @property
    def units(self) -> int:
        """Units that were streamed."""
        return sum(layer.units for layer in self.layers)

    @property
    def direct_units(self) -> int:
        """Units that came whole in one write, and needed no staging."""
        return sum(layer.direct_units for layer in self.layers)

    def begin(self, size: int) -> None:
        """Show the progress of ``size`` bytes of fp8, on the first rank."""
        if parallel_ranks().is_first:
            self._progress = quantization_progress(size)

    def quantized(self, layer: str, size: int) -> None:
        """Note that ``size`` bytes more of ``layer`` are fp8."""
        self.times.note(layer)
        self._progress.advance(size)

    def close(self) -> None:
        """End the display."""
        self._progress.close()
