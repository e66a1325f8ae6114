# SPDX-License-Identifier: Apache-2.0
"""Makes the builders of ``streams.py`` make what the overlay streams with on a CPU."""

from __future__ import annotations

from typing import Any

import pytest

from core import streams
from sglang_overlay.core.cpu_quantizers import PerTensorQuantizer, RatioArithmetic
from sglang_overlay.core.mapped_sources import MappedSources
from sglang_overlay.core.pipeline import Pipeline
from sglang_overlay.core.pipelined_stream import PipelinedStream

PIPELINE = Pipeline(2, smallest=0)


class NotedStream(PipelinedStream):
    """Attributes: ``progress``, what has been reported of it."""

    def __init__(self, *arguments: Any) -> None:
        self.progress: list[int] = []
        super().__init__(*arguments, quantized=self.progress.append, pipeline=PIPELINE)


def use(patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone."""
    patch.setattr(streams, "make_stream", NotedStream)
    patch.setattr(streams, "make_sources", MappedSources)
    patch.setattr(streams, "one_scale", lambda: PerTensorQuantizer(RatioArithmetic(streams.FP8_MAX)))
