# SPDX-License-Identifier: Apache-2.0
"""Loads on the CPU reference without one of its optimizations, for ``ci/bench --ablation``."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from sglang_overlay.core import layer
from sglang_overlay.core.capture import WriteCapture
from sglang_overlay.core.executor import Executor
from sglang_overlay.core.sources import CheckpointSources
from sglang_overlay.cpu_reference import executor, kernels
from sglang_overlay.cpu_reference.executor import CpuExecutor
from sglang_overlay.load import model_load
from sglang_overlay.offline.plan.replacing import replaced

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


def _mode_alone(_placeholders: Any, sinks: Any) -> Callable[[], WriteCapture]:
    return lambda: WriteCapture(sinks)


ABLATIONS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "threads": partial(replaced, executor, "threads_beside_loader", lambda: 0),
    "loops": partial(replaced, kernels, "_loops", lambda: None),
    "captured views": partial(replaced, layer, "capture_of", _mode_alone),
    "mapped pieces": partial(replaced, CheckpointSources, "is_mapped", lambda _sources, _tensor: False),
    "late layers": partial(replaced, CpuExecutor, "quantizes_late", False),
    "all of them": partial(replaced, model_load, "executor_for", lambda _device: Executor()),
}
"""By the name of the optimization that is left out."""
