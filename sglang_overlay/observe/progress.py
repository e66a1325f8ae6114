# SPDX-License-Identifier: Apache-2.0
"""A progress line while units are quantized, in the style of SGLang's 'Loading ... checkpoint shards' lines."""

from __future__ import annotations

import threading
from typing import Protocol

# Plain text without a bar, as in SGLang, because log wrappers (Ray, multiprocessing) prefix every line.
_LOOK = "{desc}: {percentage:3.0f}% Completed | {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
# Thousands of units finish per second; a refresh for each would be the slowest part of the load.
_REFRESH_SECONDS = 0.5


class Progress(Protocol):
    """Shows how far a load has come. ``advance`` may be called from any thread; ``close`` once, at the end."""

    def advance(self, count: int, /) -> None:
        """Note that ``count`` more bytes are quantized."""

    def close(self) -> None: ...


class SilentProgress:
    """For ranks that do not write to the terminal."""

    def advance(self, _count: int, /) -> None:
        return

    def close(self) -> None:
        return


class ProgressLine:
    """One line on standard error, through tqdm."""

    def __init__(self, total_bytes: int, description: str) -> None:
        from tqdm.auto import tqdm

        # Several loader threads (DeepSeek) may finish units at once, and tqdm's counter is not atomic.
        self._lock = threading.Lock()
        self._line = tqdm(
            total=total_bytes,
            desc=description,
            unit="B",
            unit_scale=True,
            bar_format=_LOOK,
            mininterval=_REFRESH_SECONDS,
        )

    def advance(self, count: int, /) -> None:
        with self._lock:
            self._line.update(count)

    def close(self) -> None:
        with self._lock:
            self._line.close()


def quantization_progress(total_bytes: int) -> Progress:
    """A progress line, or a silent one if there is nothing to quantize.

    Args:
        total_bytes: fp8 bytes that this rank will hold when done.
    """
    return ProgressLine(total_bytes, "Quantizing weights to FP8") if total_bytes else SilentProgress()
