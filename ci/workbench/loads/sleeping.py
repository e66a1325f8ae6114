"""A loaded model that releases its memory and gets it back, as SGLang's scheduler does it: a step of ``LoadJob``."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from workbench.loads import runtime
from workbench.loads.updates import addresses_of, moved_tensors


@dataclass(frozen=True)
class Sleep:
    """Release memory, and resume it.

    Args:
        tags: of ``ReleaseMemoryOccupationReqInput``; none, all.
    """

    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class SleepResult:
    """The result on one rank.

    Args:
        moved: tensors whose memory has moved, or that are new or gone.
        used: bytes of the device in use before, meanwhile and afterwards.
    """

    moved: tuple[str, ...]
    used: tuple[int, int, int]


def run(runner: Any, sleep: Sleep) -> SleepResult:
    """Put the model of ``runner``, a ``ModelRunner`` with a memory saver, to sleep and wake it."""
    import torch
    from sglang.srt.managers import io_struct
    from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager

    def used() -> int:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free

    if getattr(runner, "token_to_kv_pool", None) is None:
        runtime.get_ready_to_generate(runner)
    manager = SchedulerWeightUpdaterManager(
        tp_worker=SimpleNamespace(model_runner=runner),
        draft_worker=None,
        memory_saver_adapter=runner.memory_saver_adapter,
        flush_cache=lambda **_: True,
        is_fully_idle=lambda **_: True,
    )
    tags = list(sleep.tags) or None
    addresses, before = addresses_of(runner.model), used()
    manager.release_memory_occupation(io_struct.ReleaseMemoryOccupationReqInput(tags=tags))
    asleep = used()
    manager.resume_memory_occupation(io_struct.ResumeMemoryOccupationReqInput(tags=tags))
    return SleepResult(moved_tensors(addresses, runner.model), (before, asleep, used()))
