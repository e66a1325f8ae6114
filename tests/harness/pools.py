# SPDX-License-Identifier: Apache-2.0
"""Memory pools that SGLang allocates for a model that it has really loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.loads.loads import free_port, process_context

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from workbench.loads.job import LoadJob

_SECONDS = 300.0


@dataclass(frozen=True)
class Pools:
    """What SGLang's ``ModelRunner`` says of them."""

    tokens: int
    requests: int


def pools_of(job: LoadJob, memory: int) -> Pools:
    """What one rank allocates on a device of ``memory`` bytes, on which there is nothing else."""
    context = process_context("forkserver")
    mine, theirs = context.Pipe()
    process = context.Process(target=_allocate, args=(job, memory, theirs))
    process.start()
    try:
        assert mine.poll(_SECONDS), f"no pools within {_SECONDS:.0f} s"
        found: Pools = mine.recv()
    finally:
        process.kill()
        process.join()
    return found


def _allocate(job: LoadJob, memory: int, answer: Connection) -> None:
    from sglang.srt.distributed import bootstrap
    from sglang.srt.mem_cache import kv_cache_configurator
    from workbench.loads import load_worker
    from workbench.loads.fingerprints import model_bytes

    from sglang_overlay.settings import MODE_VARIABLE

    with load_worker.job_environ({MODE_VARIABLE: job.streaming}):
        # Other processes use the machine's memory at the same time.
        bootstrap.measure_pre_model_load_memory = lambda **_: memory / 2**30
        runner = load_worker.build_runner(job, 0, free_port())
        free = (memory - model_bytes(runner.model)) / 2**30
        kv_cache_configurator.get_available_gpu_memory = lambda *_, **__: free
        runner.alloc_memory_pool()
    answer.send(Pools(runner.max_total_num_tokens, runner.max_running_requests))
