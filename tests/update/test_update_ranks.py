# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on one of two ranks: both give one answer, and hold the weights of before.

test_update_rule.py has random tensors, buckets and files. These fail where no tensor is read: before, after, or
elsewhere than in a call.
"""

from __future__ import annotations

import json

import pytest
from harness.scheduler_process import Fault, SchedulerRanks
from update.test_updates import SEED, SESSIONS

from sglang_overlay.hooks.update_hooks import BEFORE_UPDATE
from sglang_overlay.observe.weights_report import STATE

POSTPROCESS = "sglang.srt.model_loader.loader:DefaultModelLoader.postprocess_weights"
LOAD_CONFIG = "sglang.srt.configs.load_config:LoadConfig.__post_init__"
ERROR = OSError("no room")


@pytest.fixture(scope="module")
def old(checkpoint):
    return checkpoint("qwen3")


@pytest.fixture(scope="module")
def new(checkpoint):
    return checkpoint("qwen3", seed=SEED)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, old):
    with SchedulerRanks(tmp_path_factory.mktemp("ranks")) as ranks:
        ranks.before = [answer.held for answer in ranks.start(old, old)]
        yield ranks


def tensors_of(held):
    return [model.tensors for model in held]


def agreed(answers, before):
    """The one answer of ranks that hold what they held before."""
    assert [answer.held for answer in answers] == before
    (told,) = {(answer.success, answer.message) for answer in answers}
    assert not told[0]
    return told[1]


@pytest.mark.parametrize("on", [0, 1])
def test_update_from_disk_fails_before_it_reads(on, ranks, new):
    assert "no room" in agreed(ranks.ask("disk", new, faults=[Fault(LOAD_CONFIG, ERROR)], on=on), ranks.before)


@SESSIONS
@pytest.mark.parametrize("on", [0, 1])
def test_session_fails_at_its_end(on, ranks, new):
    ranks.ask("begin")
    assert all(answer.success for answer in ranks.ask("tensor", new))
    assert "no room" in agreed(ranks.ask("end", faults=[Fault(POSTPROCESS, ERROR)], on=on), ranks.before)


@SESSIONS
@pytest.mark.parametrize("on", [0, 1])
def test_session_that_nobody_waits_for_fails_at_its_end(on, ranks):
    ranks.call("begin")
    answers = ranks.call("end", run_post_load=False, faults=[Fault(POSTPROCESS, ERROR)], on=on)
    assert [answer.held for answer in answers] == ranks.before
    assert {str(answer.raised) for answer in answers} == {f"rank {on}: OSError: no room. {BEFORE_UPDATE}"}


@SESSIONS
def test_broadcast_does_not_reach_all(ranks, new):
    assert ranks.ranks[0].call("join", new).success
    ranks.ask("begin")
    answers = ranks.ask("distributed", new)
    assert [tensors_of(answer.held) for answer in answers] == [tensors_of(held) for held in ranks.before]
    ((success, message),) = {(answer.success, answer.message) for answer in answers}
    assert not success
    assert "rank 1: AssertionError: Group trainer not in" in message
    assert "has not come since" in agreed(ranks.ask("end"), ranks.before)


def test_each_rank_knows_what_all_serve_and_what_became_of_their_updates(ranks, old, new):
    def told():
        """Of target and draft of each rank, the same wherever one asks."""
        one, other = (json.loads(answer.message)[STATE] for answer in ranks.ask("info"))
        assert one == other
        assert [(each["ranks"]["tp"]["rank"], each["role"]) for each in one] == [
            (rank, role) for rank in range(2) for role in ("target", "draft")
        ]
        return one

    def checksums():
        return [each["checksum"] for each in told()]

    before, failures = checksums(), [sum(each["failed_updates"].values()) for each in told()]
    # Of the same weights, target and draft serve the same.
    assert before[0] == before[1] != before[2] == before[3]
    ranks.ask("disk", new, faults=[Fault(POSTPROCESS, ERROR, after=1)])
    assert checksums() == before
    assert [sum(each["failed_updates"].values()) for each in told()] == [count + 1 for count in failures]
    assert all("no room" in each["last_update"]["failure"] for each in told() if each["role"] == "draft")
    assert all("Another model" in each["last_update"]["failure"] for each in told() if each["role"] == "target")
    assert all(answer.success for answer in ranks.ask("disk", new))
    after = checksums()
    assert after[0] == after[1] != after[2] == after[3]
    assert not {*after} & {*before}
    assert all(answer.success for answer in ranks.ask("disk", old))
    assert checksums() == before


def test_weights_are_checked_where_they_are_and_not_while_their_memory_is_released(ranks):
    def checked():
        one, other = ranks.ask("check")
        assert one.message == other.message
        assert one.success is other.success
        return one

    before = json.loads(checked().message)
    assert [(each["role"], each["ranks"]["tp"]["rank"]) for each in before] == [
        ("target", 0), ("draft", 0), ("target", 1), ("draft", 1),
    ]  # fmt: skip
    assert all("model.layers.0" in each["layers"] for each in before)
    ranks.ask("sleep")
    answer = checked()
    assert not answer.success
    assert "memory is released" in answer.message
    ranks.ask("wake")
    assert [each["layers"] for each in json.loads(checked().message)] == [each["layers"] for each in before]
