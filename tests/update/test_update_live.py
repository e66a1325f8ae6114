# SPDX-License-Identifier: Apache-2.0
"""A server whose weights are updated while it answers requests, by trainers that die, or while it is stopped.

What a request is to be answered with comes from the same server, updated from disk: test_update_serving.py holds that
this is what a fresh load answers.
"""

from __future__ import annotations

import re
import signal
import sys
import time

import pytest
from harness.clients import LongRequest, generate, send, send_all, update_from_disk
from harness.trainer import GROUP, TrainerError, has_sessions, run_in_a_process, until_idle
from update.test_updates import mixture
from workbench.loads import serving
from workbench.loads.serving import ServerError, post
from workbench.loads.updates import tensors_of

from sglang_overlay.hooks.update_hooks import BEFORE_CALL, BEFORE_UPDATE

pytestmark = [pytest.mark.server, pytest.mark.skipif(not has_sessions(), reason="this release has no sessions")]

PROMPT = tuple(range(3, 300, 3))
LONG = 100
STARTED = 10
"""Tokens that a request has got when its server's weights are updated."""
SHORT = 16
END_SECONDS = 60


class Live:
    """A server of ``old``, ``new`` and ``other`` weights of one model, one after another."""

    def __init__(self, launch, process, checkpoint):
        self.url = launch.url
        self.process = process
        self.log = launch.log
        self.old, self.new, self.other = (checkpoint("qwen3", seed=seed) for seed in range(3))
        self.answers = {}
        for folder in (self.new, self.old):
            update_from_disk(self.url, folder)
            self.answers[folder] = self.answer(LONG)

    def answer(self, new_tokens=SHORT, prompt=PROMPT):
        (tokens,) = generate(self.url, [prompt], new_tokens)
        until_idle(self.url)
        return tokens

    def serves(self, folder):
        return self.answer() == self.answers[folder][:SHORT]

    def begin_long_answer(self):
        request = LongRequest(self.url, PROMPT, LONG)
        request.wait_for(STARTED)
        return request


@pytest.fixture(scope="module")
def started(checkpoint, tmp_path_factory):
    port = serving.free_port()
    arguments = ("--quantization", "fp8", "--device", "cpu", "--log-level", "info")
    command = serving.sglang_command(sys.executable, str(checkpoint("qwen3")), port, arguments)
    log = tmp_path_factory.mktemp("live") / "server.log"
    # Threads that wait for each other cost more than they bring to a model of this size.
    variables = {"SGLANG_STREAMFP8": "require", "SGLANG_CPU_OMP_THREADS_BIND": "0"}
    launch = serving.Launch(command, port, log, variables)
    process = serving._start(launch)
    try:
        serving._wait_until_ready(process, launch, 300, serving.no_news)
        yield Live(launch, process, checkpoint)
    finally:
        serving.stop(process)


@pytest.fixture
def live(started):
    """The server, serving the old weights, without a session."""
    update_from_disk(started.url, started.old)
    assert started.serves(started.old)
    return started


WAYS = {"disk": update_from_disk, "tensors": send_all}


def paused_for_an_update(way, live, mode, *, flush_cache):
    """The tokens of a request that is paused for an update, and how many of them it had by then."""
    request = live.begin_long_answer()
    post(live.url, "pause_generation", {"mode": mode})
    WAYS[way](live.url, live.new, flush_cache=flush_cache)
    so_far = request.wait_until_quiet()
    assert STARTED <= so_far < LONG
    post(live.url, "continue_generation", {})
    return request.end(), so_far


@pytest.mark.parametrize("way", WAYS)
class TestRequestsMeanwhile:
    """Updates leave the cache as it is: the last tokens of a request are sent a little before the scheduler lets go of
    it, and until then SGLang flushes nothing, and answers that the update has failed."""

    def test_update_waits_for_them(self, way, live):
        request = live.begin_long_answer()
        WAYS[way](live.url, live.new, flush_cache=False)
        assert request.end() == live.answers[live.old]
        until_idle(live.url)
        assert live.serves(live.new)

    def test_those_that_are_retracted_go_on_with_the_new_weights_alone(self, way, live):
        tokens, so_far = paused_for_an_update(way, live, "retract", flush_cache=True)
        assert tokens[:so_far] == live.answers[live.old][:so_far]
        until_idle(live.url)
        assert tokens[so_far:] == live.answer(LONG - so_far, (*PROMPT, *tokens[:so_far]))
        assert live.serves(live.new)

    def test_those_that_are_paused_in_place_go_on(self, way, live):
        tokens, so_far = paused_for_an_update(way, live, "in_place", flush_cache=False)
        assert len(tokens) == LONG
        old = live.answers[live.old]
        assert tokens[:so_far] == old[:so_far]
        assert tokens[so_far:] != old[so_far:]
        until_idle(live.url)
        assert live.serves(live.new)

    def test_those_that_are_aborted_end_with_old_weights(self, way, live):
        request = live.begin_long_answer()
        if way == "disk":
            update_from_disk(live.url, live.new, abort_all_requests=True, flush_cache=False)
        else:
            post(live.url, "pause_generation", {"mode": "abort"})
            send_all(live.url, live.new)
            post(live.url, "continue_generation", {})
        tokens = request.end()
        until_idle(live.url)
        assert request.reason == "abort"
        assert tokens == live.answers[live.old][: len(tokens)]
        assert live.serves(live.new)


HALF = r"layers\.2\.self_attn\.q_proj"
WHOLE = r"layers\.[01]\.|embed"


def test_requests_between_two_calls_get_the_units_that_have_come(live, tmp_path):
    """And those after a session that fails get nothing of it, from the cache neither."""
    mixed = mixture(live.old, live.new, WHOLE, tmp_path / "mixed")
    update_from_disk(live.url, mixed)
    expected = live.answer()
    update_from_disk(live.url, live.old)
    post(live.url, "begin_weight_update", {})
    assert live.serves(live.old)
    send(live.url, _tensors(live.new, f"{WHOLE}|{HALF}"))
    # Without flushing the cache, as ``answer`` does: it now has keys and values of these weights.
    assert generate(live.url, [PROMPT], SHORT) == [expected]
    assert expected != live.answers[live.old][:SHORT]
    time.sleep(1)
    with pytest.raises(ServerError, match=r"model\.layers\.2\.self_attn\.qkv_proj\.weight"):
        post(live.url, "end_weight_update", {})
    assert live.serves(live.old)


def _tensors(checkpoint, names):
    return [(name, tensor) for name, tensor in tensors_of(checkpoint) if re.search(names, name)]


def test_last_tensor_of_a_session_has_the_wrong_shape(live):
    *most, (name, tensor) = tensors_of(live.new)
    post(live.url, "begin_weight_update", {})
    send(live.url, most)
    with pytest.raises(ServerError, match=f"(?s)400.*{BEFORE_CALL}"):
        send(live.url, [(name, tensor[:1])])
    with pytest.raises(ServerError, match=f"(?s)400.*has not come since: {name}.*{BEFORE_UPDATE}"):
        post(live.url, "end_weight_update", {})
    assert live.serves(live.old)
    send_all(live.url, live.new)
    assert live.serves(live.new)


@pytest.mark.nightly
class TestTrainerThatDies:
    """In the middle of a broadcast, with a session open."""

    @pytest.fixture
    def left(self, live):
        # More than a call, in the middle of the next: units are incomplete, and a tensor never comes.
        with pytest.raises(TrainerError) as died:
            run_in_a_process("distributed", "--url", live.url, "--checkpoint", live.other, "--dies-after", 20)
        assert died.value.code == -signal.SIGKILL
        with pytest.raises(ServerError, match="already open"):
            post(live.url, "begin_weight_update", {})
        return live

    def test_session_is_ended_and_another_trainer_goes_on(self, left):
        with pytest.raises(ServerError, match=f"(?s)400.*{BEFORE_UPDATE}"):
            post(left.url, "end_weight_update", {})
        assert left.serves(left.old)
        post(left.url, "destroy_weights_update_group", {"group_name": GROUP})
        run_in_a_process("distributed", "--url", left.url, "--checkpoint", left.new)
        assert left.serves(left.new)

    def test_folder_that_is_read_replaces_what_it_has_sent(self, left):
        update_from_disk(left.url, left.new)
        assert left.serves(left.new)
        post(left.url, "end_weight_update", {})
        assert left.serves(left.new)


def test_server_that_is_stopped_in_a_session_ends(live):
    """The last test: there is no server afterwards."""
    post(live.url, "begin_weight_update", {})
    send(live.url, _tensors(live.new, f"{WHOLE}|{HALF}"))
    begin = time.monotonic()
    live.process.send_signal(signal.SIGTERM)
    live.process.wait(END_SECONDS)
    assert time.monotonic() - begin < END_SECONDS
    assert "Traceback" not in live.log.read_text(errors="replace").rpartition("SIGTERM")[2]
