# SPDX-License-Identifier: Apache-2.0
"""Makes the builders of ``streams.py`` make what the overlay streams with on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from core import streams
from sglang_overlay.core.checkpoint_stream import CheckpointStream
from sglang_overlay.core.executor import Executor
from sglang_overlay.cpu_reference.per_tensor import PerTensorQuantizer, RatioArithmetic
from sglang_overlay.cpu_reference.workers import Workers


class InThreads(Executor):
    """Quantizes in threads, with the quantizers that it is given."""

    def __init__(self, workers: Workers) -> None:
        self.takes = workers.takes
        self.submit = workers.submit
        self.check = workers.check
        self.close = workers.close


EXECUTOR: Executor = InThreads(Workers(2, smallest=0))


class NotedStream(CheckpointStream):
    """Attributes: ``progress``, what has been reported of it."""

    def __init__(self, *arguments: Any) -> None:
        self.progress: list[int] = []
        super().__init__(*arguments, progress=self.progress.append, executor=EXECUTOR)


def use(patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone."""
    patch.setattr(streams, "make_stream", NotedStream)
    patch.setattr(streams, "one_scale", lambda: PerTensorQuantizer(RatioArithmetic(streams.FP8_MAX)))
