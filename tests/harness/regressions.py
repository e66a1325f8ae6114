"""Tasks for ``Planners``: old behaviour, brought back to see that it is noticed, and another GPU."""

from __future__ import annotations

import os
import signal
from typing import Any

from sglang_overlay.core import quantizers
from sglang_overlay.core.executor import Executor
from sglang_overlay.offline.plan import simulate as simulating
from sglang_overlay.offline.plan.job import Job, PlannedLoad
from sglang_overlay.offline.plan.layers import whole_layers
from sglang_overlay.offline.plan.replacing import replaced
from sglang_overlay.offline.plan.simulate import simulate

_held: list[Any] = []


def held_reference(job: Job) -> PlannedLoad:
    """Something keeps the bf16 values of every unit that has been quantized."""
    for kind in (quantizers.WholeUnitQuantizer, quantizers.RowQuantizer):
        kind.quantize_run = _holding(kind.quantize_run)  # type: ignore[method-assign]
    return simulate(job)


def _holding(original: Any) -> Any:
    def quantize_run(self: Any, values: Any, *results: Any) -> Any:
        _held.append(values)
        return original(self, values, *results)

    return quantize_run


def every_unit_computed(job: Job) -> PlannedLoad:
    """Quantizers run for each unit, not for two of each kind."""
    with replaced(simulating, "Replaying", lambda _account: Executor()):
        return simulate(job)


def killed(_job: Job) -> PlannedLoad:
    """The system ends the process that plans, as it does where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def layer_sized_staging(job: Job) -> PlannedLoad:
    """Whole layers wait in bf16, where units should."""
    with whole_layers():
        return simulate(job)


def on_hopper(job: Job) -> PlannedLoad:
    """Plan where SGLang takes the GPU for a Hopper one, which it asks for before it uses some kernels."""
    from sglang.srt.runtime_context import override_platform

    with override_platform(is_sm90=True):
        return simulate(job)
