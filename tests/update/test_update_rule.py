# SPDX-License-Identifier: Apache-2.0
"""After each answer to a random weight update, every rank holds the old weights or the new ones, as the answer says.

``STREAMFP8_UPDATES=5000`` makes more; ``STREAMFP8_UPDATES_FIRST=n STREAMFP8_UPDATES=1`` makes one of them.
"""

from __future__ import annotations

import os

import pytest
from harness.exports import ExportJob, run_export
from workbench.loads.job import LoadJob
from workbench.loads.update_rule import RandomUpdates

from sglang_overlay.settings import SCHEME_VARIABLE

FIRST = int(os.environ.get("STREAMFP8_UPDATES_FIRST", "0"))
COUNT = int(os.environ.get("STREAMFP8_UPDATES", "500"))

SHAPE = (("num_hidden_layers", 1), ("num_experts", 4))


def held(workers, job, share):
    results = workers.load(job).ranks
    found = [rank.updates[0] for rank in results]
    broken = [line for result in found for line in result.broken]
    assert not broken, "\n".join([f"{len(broken)} times", *broken[:20]])
    answers = [result.answers for result in found]
    assert all(answer == answers[0] for answer in answers)
    assert len(answers[0]) == share
    return [success for _, _, successes in answers[0] for success in successes]


def paths_of(checkpoint, family, **fields):
    return tuple(checkpoint(family, seed=seed, **fields) for seed in range(3))


def test_two_ranks_hold_what_they_answer(workers, checkpoint):
    paths = paths_of(checkpoint, "qwen3_moe", overrides=SHAPE)
    share = -(-COUNT // 2)
    job = LoadJob(paths[0], streaming="require", tp_size=2, updates=(RandomUpdates(paths, (), FIRST, share),))
    answers = held(workers, job, share)
    if COUNT >= 100:
        assert 0.3 < sum(answers) / len(answers) < 0.95


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_model_that_is_sent_values_with_scales_holds_what_it_answers(lora, workers, checkpoint, tmp_path):
    paths, ready = paths_of(checkpoint, "qwen3", overrides=SHAPE[:1]), []
    for number, path in enumerate(paths):
        run_export(ExportJob(path, tmp_path / str(number), "block"))
        ready.append(tmp_path / str(number))
    share = -(-COUNT // 8)
    updates = RandomUpdates(paths, tuple(ready), FIRST, share, lora)
    held(workers, LoadJob(paths[0], streaming="require", environ={SCHEME_VARIABLE: "block"}, updates=(updates,)), share)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_model_with_lora_layers_holds_what_it_answers(family, workers, checkpoint):
    paths = paths_of(checkpoint, family, overrides=SHAPE if family == "qwen3_moe" else SHAPE[:1])
    share = -(-COUNT // 8)
    updates = RandomUpdates(paths, (), FIRST, share, lora=True)
    held(workers, LoadJob(paths[0], streaming="require", updates=(updates,)), share)
