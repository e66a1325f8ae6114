# SPDX-License-Identifier: Apache-2.0
"""What reading a checkpoint takes of the host is what real loads take."""

from __future__ import annotations

import pytest
import torch
from workbench.loads.job import LoadJob
from workbench.quality import families

from sglang_overlay.observe import terminal
from sglang_overlay.offline.plan import document, table
from sglang_overlay.offline.plan.checkpoint import TensorHeader, WeightFile
from sglang_overlay.offline.plan.host import HeldTensors, HostMemory
from sglang_overlay.offline.plan.job import Job
from sglang_overlay.offline.plan.planner import Request

CONTAINERS = ("safetensors", "bin")
LARGER = (("hidden_size", 512), ("moe_intermediate_size", 512), ("num_experts", 32))
"""Large enough that files, not what a process needs once, make the difference: 150 MB."""


def files(*sizes):
    return [WeightFile(str(number), (TensorHeader("a", (size,), torch.uint8),)) for number, size in enumerate(sizes)]


@pytest.mark.parametrize(
    ("sizes", "held", "unmapped"),
    [
        ([10], 0, 20),
        ([10] * 100, 0, 180),
        ([10] * 100, 5, 185),
        ([10] * 100, 1000, 1080),
        ([1] * 50 + [10] * 10 + [1] * 50, 0, 180),
    ],
    ids=["one file", "many", "some held", "all held", "large ones together"],
)
def test_files_are_held_as_many_as_are_read_at_once(sizes, held, unmapped):
    assert HostMemory.of(files(*sizes), held) == HostMemory(held, unmapped, sum(sizes))


def test_tensors_that_are_held_are_counted():
    held, kept = HeldTensors(), []
    for number in range(6):
        tensor = torch.empty(10, dtype=torch.uint8)
        held.give(tensor, kept[-1:])
        kept.append(tensor)
        if number == 3:
            del kept[:3]
    held.finish()
    assert held.peak == 20


def test_tensors_that_nobody_lets_go_of_are_all_held():
    held, kept = HeldTensors(), []
    for _ in range(3):
        kept.append(torch.empty(10, dtype=torch.uint8))
        held.give(kept[-1], kept[-2:-1])
    held.finish()
    assert held.peak == 30


@pytest.mark.parametrize("architecture", ["GptOssForCausalLM", "PhiForCausalLM"])
def test_loader_that_sorts_or_collects_the_checkpoint_is_known(architecture, checkpoint_folder, simulated):
    found = simulated(Job(families.build(architecture, checkpoint_folder)))
    assert found.host.held == found.host.pickled == found.checkpoint_bytes


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_loader_that_takes_tensor_by_tensor_holds_few(family, checkpoint, simulated):
    found = simulated(Job(checkpoint(family, files=3)))
    assert found.host.held < 0.2 * found.checkpoint_bytes == 0.2 * found.host.pickled


def test_real_loads_need_what_is_planned(checkpoint, simulated, workers):
    safetensors, pickled = (checkpoint("qwen3_moe", overrides=LARGER, files=4, container=name) for name in CONTAINERS)
    host = simulated(Job(safetensors)).host
    disabled = {"server_args": {"weight_loader_disable_mmap": True}}
    mapped, unmapped, from_bin = (
        workers.load_fresh(LoadJob(path, described="sizes", **fields)).ranks[0].memory.peak_above_start
        for path, fields in ((safetensors, {}), (safetensors, disabled), (pickled, {}))
    )
    assert mapped < host.pickled
    assert 0.8 * host.pickled < from_bin - mapped < 1.2 * host.pickled
    # How many of the threads hold their file twice at the same time is the scheduler's choice.
    assert 0.6 * host.pickled < unmapped - mapped < 1.2 * host.unmapped


def test_it_is_told_in_the_table_and_in_json(checkpoint_folder, planned, capsys):
    plan = planned(Request(families.build("GptOssForCausalLM", checkpoint_folder), modes=("streaming",)))
    table.print_plan(terminal.console(), plan, None)
    told = capsys.readouterr().out
    assert "Host memory of each rank" in told
    assert "This model's loader collects the whole checkpoint" in told
    host = document.to_json(plan)["ranks"][0]["loads"]["streaming"]["host"]
    assert host["held_bytes"] == host["pickled_bytes"] > 0
