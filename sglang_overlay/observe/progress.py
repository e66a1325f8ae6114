# SPDX-License-Identifier: Apache-2.0
"""A progress line while units are quantized, in the look of SGLang's own 'Loading ... checkpoint shards' lines."""

from __future__ import annotations

import threading
from typing import Protocol

# SGLang writes progress as plain text without a bar, because log wrappers (Ray, multiprocessing) prefix every line.
_LOOK = "{desc}: {percentage:3.0f}% Completed | {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
# Units finish by the thousand a second; a refresh for each would be the slowest part of the load.
_REFRESH_SECONDS = 0.5


class Progress(Protocol):
    """Shows how far a load has come. ``advance`` may be called from any thread; ``close`` once, at the end."""

    def advance(self, count: int, /) -> None:
        """``count`` more bytes are quantized."""

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

        # Several of DeepSeek's loader threads finish units at once, and tqdm's own counter is not atomic.
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
    """A progress line, or silence where nothing is to be quantized.

    ``total_bytes``: fp8 bytes this rank will hold when done.
    """
    return ProgressLine(total_bytes, "Quantizing weights to FP8") if total_bytes else SilentProgress()
