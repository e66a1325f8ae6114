# SPDX-License-Identifier: Apache-2.0
"""What goes wrong on one of two ranks: both give one answer, and hold the weights of before.

test_update_rule.py has random tensors, buckets and files. These fail where no tensor is read: before, after, or
elsewhere than in a call.
"""

from __future__ import annotations

import pytest
from harness.scheduler_process import Fault, SchedulerRanks
from update.test_updates import SEED, SESSIONS

from sglang_overlay.hooks.update_hooks import BEFORE_UPDATE

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
