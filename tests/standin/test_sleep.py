# SPDX-License-Identifier: Apache-2.0
"""A server that sleeps: torch_memory_saver's own library unmaps the stand-in GPU's memory, and maps other memory again.

What is mapped again holds garbage. So whatever a load has made once, and a full update does not make again, is found.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from workbench.loads.job import LoadJob
from workbench.loads.loads import compare
from workbench.loads.sleeping import Sleep
from workbench.loads.updates import Update

from standin.conftest import Surroundings
from standin.test_backends import BOTH, OVERRIDES, Case, experts, gemm, job_of

H200 = Surroundings("h200", memory_saver=True)
TAGS = (("kv_cache",), ("weights",), ("weights", "kv_cache"), ("cuda_graph",), ())
"""What trainers name; none is everything."""
LAYERS = (("num_hidden_layers", 2),)

CASES = (
    pytest.param(H200, Case("deepseek_v3"), id="h200 deepseek_v3"),
    *(
        pytest.param(replace(there, memory_saver=True), case, id=f"{there.gpu} {case.name}", marks=pytest.mark.nightly)
        for there, case in (
            (H200, Case("qwen3_moe")),
            (H200, Case("qwen3_moe", scheme="block")),
            (H200, Case("qwen3_moe", scheme="channel")),
            (Surroundings("a100"), Case("qwen2_moe")),
            (Surroundings("a100"), Case("deepseek_v3")),
            (Surroundings("b200", BOTH), experts("deep_gemm", scheme="block")),
            (Surroundings("b200", BOTH), experts("flashinfer_trtllm", quantization="mxfp8")),
            (Surroundings("b200", BOTH), gemm("deep_gemm", "deepseek_v3", quantization="mxfp8")),
            (Surroundings("mi300x"), Case("qwen3_moe")),
            (Surroundings("mi355x-aiter"), experts("auto")),
        )
    ),
)


def job(case: Case, path, *updates, **args) -> LoadJob:
    found = job_of(case, path)
    return replace(found, updates=updates, server_args={**found.server_args, "enable_memory_saver": True, **args})


@pytest.mark.parametrize(("there", "case"), CASES)
def test_an_update_after_waking_leaves_what_a_fresh_load_leaves(there, case, loads_in, checkpoint):
    overrides = (*OVERRIDES.get((there.gpu, case.family), ()), *LAYERS)
    old, new = (checkpoint(case.family, overrides=overrides, seed=seed) for seed in (0, 1))
    updates = (*map(Sleep, TAGS), Update("tensor", new))
    fresh, woken = loads_in(there, job(case, new)), loads_in(there, job(case, old, *updates))
    *sleeps, change = woken.ranks[0].updates
    assert (change.success, change.moved, [sleep.moved for sleep in sleeps]) == (True, (), [()] * len(TAGS))
    assert compare(fresh, woken) == []
    for tags, sleep in zip(TAGS, sleeps, strict=True):
        before, asleep, after = sleep.used
        assert after == before
        if "weights" in tags:
            assert before - asleep >= woken.ranks[0].model_bytes
    # All of it is released: nothing is left on the device that stock would not have left, which quantizes nothing.
    bf16 = replace(job(case, old, Sleep()), streaming="0", environ={}, quantization=None)
    assert sleeps[-1].used[1] <= loads_in(there, bf16).ranks[0].updates[0].used[1]


def test_a_backup_brings_everything_back(loads_in, checkpoint):
    path, case = checkpoint("deepseek_v3", overrides=LAYERS), Case("deepseek_v3")
    woken = loads_in(H200, job(case, path, *map(Sleep, TAGS), enable_weights_cpu_backup=True))
    assert compare(loads_in(H200, job(case, path)), woken) == []
    lost = loads_in(H200, job(case, path, Sleep()))
    assert any(".mlp.experts.w13_weight: bytes differ" in line for line in compare(woken, lost))
