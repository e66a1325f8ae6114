# SPDX-License-Identifier: Apache-2.0
"""Failures of a hooked function itself; test_updates.py has those that real updates bring about."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from core.pipelined import InThreads

from sglang_overlay.cpu_reference.workers import Workers
from sglang_overlay.errors import PartialUpdateError, StagingMemoryError, WeightUpdateError
from sglang_overlay.hooks import update_hooks
from sglang_overlay.hooks.update_hooks import BEFORE_CALL, BEFORE_UPDATE, Outcome
from sglang_overlay.update import model as known_models
from sglang_overlay.update import session
from sglang_overlay.update.model import UpdatableModel, remember, updatable
from sglang_overlay.update.session import WeightUpdate


class Model(torch.nn.Module):
    def load_weights(self, weights):
        """As each of SGLang's models has it."""


@pytest.fixture
def known():
    """A model with an open session; ``updater`` is what SGLang's method of that name belongs to."""
    model = Model()
    found = UpdatableModel([], {})
    remember(model, found)
    found.begin()
    return SimpleNamespace(model=model), found


def fail(_updater, *, run_post_load):
    raise OSError(f"no room, run_post_load={run_post_load}")


def test_session_that_fails_at_its_end_is_closed_and_answered(known):
    updater, found = known
    assert end(updater, fail) == [f"OSError: no room, run_post_load=False. {BEFORE_UPDATE}"]
    assert found.open is None


def test_session_that_nobody_waits_for_raises_and_is_closed(known):
    updater, found = known
    with pytest.raises(WeightUpdateError, match="no room"):
        update_hooks.end_weight_update(fail, updater, run_post_load=False)
    assert found.open is None


@dataclass
class Ended:
    """SGLang's answer to the end of a session."""

    success: bool
    message: str = "Success"


def end(updater, original=lambda _updater, *, run_post_load: None):
    """End a session as SGLang's scheduler does; what went wrong."""
    runner = SimpleNamespace(model=updater.model)
    manager = SimpleNamespace(_select_runners=lambda: [("target", runner)])

    def end_all(_manager, _request):
        update_hooks.end_weight_update(original, updater, run_post_load=False)
        return Ended(success=True)

    answer = update_hooks.end_session(end_all, manager, None)
    return [] if answer.success else [answer.message]


def run_out(*_args, **_kwargs):
    raise StagingMemoryError("memory ran out")


def test_session_whose_workers_failed_is_closed_and_answered(known):
    updater, found = known
    found.begin(InThreads(Workers(1)))._executor.submit(run_out)
    assert end(updater) == [f"StagingMemoryError: memory ran out. {BEFORE_UPDATE}"]
    assert found.open is None


def test_session_that_cannot_be_opened_is_answered_at_its_end_and_the_next_one_succeeds(known, monkeypatch):
    updater, found = known
    with monkeypatch.context() as patch:
        patch.setattr(known_models, "WeightUpdate", run_out)
        update_hooks.begin_weight_update(lambda _updater: None, updater)
    assert found.open is None
    assert end(updater) == [f"StagingMemoryError: memory ran out. {BEFORE_UPDATE}"]
    update_hooks.begin_weight_update(lambda _updater: None, updater)
    assert end(updater) == []


def test_end_of_a_session_without_an_update_is_one_of_its_own(known):
    updater, found = known
    found.abort()
    seen = []
    update_hooks.end_weight_update(
        lambda _updater, *, run_post_load: seen.append(session._current.get()), updater, run_post_load=True
    )
    assert [type(opened) for opened in seen] == [WeightUpdate]
    assert found.open is None


CALLS = {
    "tensor": lambda updater: update_hooks.update_weights_from_tensor(lambda *_: (True, ""), updater, []),
    "distributed": lambda updater: update_hooks.load_weights_from_distributed(lambda *_: (True, ""), updater, []),
    "ipc": lambda updater: update_hooks.update_weights_from_ipc(lambda *_: (True, ""), updater, None),
}


@pytest.mark.parametrize("moment", ["__init__", "finish"])
@pytest.mark.parametrize("call", CALLS)
def test_call_whose_update_fails_at_either_end_is_answered(call, moment, known, monkeypatch):
    updater, found = known
    found.abort()
    monkeypatch.setattr(WeightUpdate, moment, run_out)
    answer = (False, f"StagingMemoryError: memory ran out. {BEFORE_UPDATE}")
    assert CALLS[call](updater) == answer
    assert found.open is None


def test_answer_has_the_notes_of_what_went_wrong(known):
    updater, _ = known

    def fail(*_):
        error = OSError("cannot be read.")
        error.__notes__ = ["Of tensor x."]
        raise error

    success, message = update_hooks.update_weights_from_ipc(fail, updater, None)
    assert not success
    assert message == f"OSError: cannot be read. {BEFORE_CALL}\nOf tensor x."


def test_interrupt_is_not_made_an_answer(known):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_hooks.update_weights_from_ipc(interrupt, known[0], None)


def test_partial_update_stays_one(known, monkeypatch):
    def finish(_update, _model):
        raise PartialUpdateError("half of it came")

    updater, found = known
    monkeypatch.setattr(WeightUpdate, "finish", finish)
    with pytest.raises(PartialUpdateError, match=f"^half of it came. {BEFORE_UPDATE}$"):
        update_hooks.end_weight_update(lambda _updater, *, run_post_load: None, updater, run_post_load=True)
    assert found.open is None


@pytest.fixture
def disk(known):
    """Updates from disk: ``run`` one whose reading of weights is ``load``; the path that ``load`` leaves."""
    updater, found = known
    found.abort()
    updater.model_config = SimpleNamespace(model_path="served")

    def run(load):
        def original(updater, path):
            updater.model_config.model_path = path
            return load()

        return update_hooks.update_weights_from_disk(original, updater, "new")

    return updater, run


@pytest.mark.parametrize("moment", ["__init__", "finish"])
def test_update_from_disk_that_fails_at_either_end_goes_back_to_the_path_before(moment, disk, monkeypatch):
    updater, run = disk
    monkeypatch.setattr(WeightUpdate, moment, run_out)
    seen = []

    def load():
        with pytest.raises(WeightUpdateError):
            update_hooks.load_weights_and_postprocess(lambda *_: None, updater.model, [], torch.device("cpu"))
        # As upstream does, to read the original weights again.
        update_hooks.load_weights_and_postprocess(
            lambda *_: seen.append("read"), updater.model, [], torch.device("cpu")
        )
        return False, ""

    told = f"Failed to update weights: StagingMemoryError: memory ran out. {BEFORE_UPDATE}"
    assert run(load) == (False, told)
    assert seen == []
    assert updater.model_config.model_path == "served"


def test_update_from_disk_that_finds_no_weights_leaves_the_path_before(disk):
    updater, run = disk
    assert run(lambda: (False, "no such folder")) == (False, f"no such folder. {BEFORE_UPDATE}")
    assert updater.model_config.model_path == "served"


def test_update_from_disk_that_raises_leaves_the_path_before(disk):
    updater, run = disk
    success, message = run(run_out)
    assert not success
    assert message == f"Failed to update weights: StagingMemoryError: memory ran out. {BEFORE_UPDATE}"
    assert updater.model_config.model_path == "served"


def test_update_from_disk_that_succeeds_leaves_the_new_path(disk):
    updater, run = disk
    assert run(lambda: (True, "")) == (True, "")
    assert updater.model_config.model_path == "new"


@pytest.fixture
def direct(known):
    """A direct update of a layer that stock quantized, with values of a dtype; what stock's loader was given."""
    updater, _ = known
    model, loaded = updater.model, []
    model.weight = torch.nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)
    model.weight_scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)

    def load(_model, part):
        loaded.extend(name for name, _ in part)

    def run(dtype):
        tensors = [("weight_scale", torch.ones(1)), ("weight", torch.ones(2).to(dtype))]
        update_hooks.load_weights_direct(load, model, tensors)

    return run, loaded


def test_direct_update_gives_stock_fp8_values_and_scales(direct):
    run, loaded = direct
    run(torch.float8_e4m3fn)
    assert loaded == ["weight_scale", "weight"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_direct_update_refuses_to_have_stock_cast_to_fp8(dtype, direct):
    run, loaded = direct
    with pytest.raises(WeightUpdateError, match=r"^weight was quantized by stock SGLang"):
        run(dtype)
    assert loaded == []


@pytest.fixture
def pair():
    """A target and a draft, each with one weight of zeros, and a manager of theirs, as SGLang's."""
    runners = []
    for role in ("target", "draft"):
        model = Model()
        model.weight = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
        remember(model, UpdatableModel([], {}))
        runners.append(SimpleNamespace(role=role, model=model, model_config=SimpleNamespace(model_path="served")))
    return runners


def update_both(runners, way, failing):
    """Update all models with ones, of which the one called ``failing`` fails when it has been written to."""

    def load(runner):
        runner.model.weight.data.copy_(torch.ones(2))
        if runner.role == failing:
            raise OSError("no room")

    def from_disk(runner, path):
        runner.model_config.model_path = path
        try:
            update_hooks.load_weights_and_postprocess(lambda *_: load(runner), runner.model, [], torch.device("cpu"))
        except WeightUpdateError as error:
            return False, str(error)
        return True, "Success"

    calls = {
        "disk": lambda runner: update_hooks.update_weights_from_disk(from_disk, runner, "new"),
        "tensor": lambda runner: update_hooks.update_weights_from_tensor(
            lambda *_: (True, load(runner) or "Success"), runner, []
        ),
        "ipc": lambda runner: update_hooks.update_weights_from_ipc(
            lambda *_: (True, load(runner) or "Success"), runner, None
        ),
    }

    def update_all(_manager, _request):
        for runner in runners:
            success, message = calls[way](runner)
            if not success:
                break
        return success, message

    return update_hooks.update_of_all_models(update_all, None, None)


def held(runners):
    assert all(updatable(runner.model).open is None for runner in runners)
    return [(runner.model.weight.tolist(), runner.model_config.model_path) for runner in runners]


@pytest.mark.parametrize("way", ["disk", "tensor", "ipc"])
@pytest.mark.parametrize("failing", ["target", "draft"])
def test_target_and_draft_go_back_together(failing, way, pair):
    success, message = update_both(pair, way, failing)
    assert not success
    assert BEFORE_UPDATE in message
    assert held(pair) == [([0.0, 0.0], "served")] * 2
    success, _ = update_both(pair, way, "")
    assert success
    assert held(pair) == [([1.0, 1.0], "new" if way == "disk" else "served")] * 2


def test_draft_that_is_not_streamed_takes_its_target_along(pair):
    target, draft = pair
    stock = SimpleNamespace(role="draft", model=Model(), model_config=draft.model_config)

    def update_all(_manager, _request):
        answer = update_hooks.update_weights_from_tensor(lambda *_: (True, fill(target)), target, [])
        assert answer[0]
        assert target.model.weight.tolist() == [1.0, 1.0]
        return update_hooks.update_weights_from_tensor(lambda *_: (False, "stock's"), stock, [])

    def fill(runner):
        runner.model.weight.data.fill_(1)
        return "Success"

    assert update_hooks.update_of_all_models(update_all, None, None) == (False, "stock's")
    assert held([target]) == [([0.0, 0.0], "served")]


def test_answer_tells_of_all_models_what_upstream_keeps_of_the_last():
    together = update_hooks.Together()
    together.joined(Outcome(unused=["a", "b"], untouched=["x"], advice="Rename."))
    told = together.joined(Outcome(unused=["b", "c"], untouched=["y"]))
    assert told == Outcome(unused=["b"], untouched=["x", "y"], advice="Rename.")
    # One that is not streamed may have taken any.
    together.joined(Outcome())
    assert together.joined(Outcome(unused=["b"])).unused == []
    assert not together.failed
    together.joined(Outcome("no room"))
    assert together.failed
