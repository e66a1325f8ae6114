# SPDX-License-Identifier: Apache-2.0
"""Updates that go wrong somewhere, as a real scheduler of a target and a draft answers them.

test_updates.py has those that go wrong by what they bring.
"""

from __future__ import annotations

import re

import pytest
import torch
from harness.scheduler_process import Fault, SchedulerProcess
from safetensors.torch import save_file
from update.test_updates import BEGIN, SEED, SESSIONS
from workbench.loads.fingerprints import hash_of

from sglang_overlay.errors import PartialUpdateError, StagingMemoryError, WeightUpdateError
from sglang_overlay.hooks import releases
from sglang_overlay.hooks.update_hooks import BEFORE_CALL, BEFORE_UPDATE, Outcome, Together

UPDATE = "sglang_overlay.update.weight_update:WeightUpdate"
KEEP = "sglang_overlay.update.undo:UndoLog.keep"
LOAD = "sglang.srt.models.qwen3:Qwen3ForCausalLM.load_weights"
POSTPROCESS = "sglang.srt.model_loader.loader:DefaultModelLoader.postprocess_weights"
POST_LOAD = "sglang.srt.model_executor.model_runner_components.weight_updater:post_load_weights"
LAYERS = 3
OUT_OF_MEMORY = StagingMemoryError("memory ran out")


def out_of_memory(function, after=0):
    return [Fault(f"{UPDATE}.{function}", OUT_OF_MEMORY, after)]


@pytest.fixture(scope="module")
def old(checkpoint):
    return checkpoint("qwen3")


@pytest.fixture(scope="module")
def new(checkpoint):
    return checkpoint("qwen3", seed=SEED)


@pytest.fixture(scope="module")
def process(tmp_path_factory, old):
    log = tmp_path_factory.mktemp("scheduler") / "log.txt"
    with SchedulerProcess(log, SGLANG_EXTERNAL_MODEL_PACKAGE="harness.misbehaving") as process:
        process.before = process.start(old, old).held
        yield process


@pytest.fixture
def scheduler(process, old):
    """A scheduler whose target and draft hold the old weights."""
    yield process
    if process.ask("disk", old).held != process.before:
        process.start(old, old)


@pytest.fixture
def before(scheduler):
    return scheduler.before


@SESSIONS
class TestSession:
    """Begin, calls and end, of which upstream answers success whatever becomes of the end."""

    @pytest.fixture(autouse=True)
    def _ended(self, scheduler):
        yield
        scheduler.ask("end")

    def test_whose_end_fails_is_closed_and_answered(self, scheduler, new, before):
        scheduler.ask("begin")
        assert scheduler.ask("tensor", new).success
        answer = scheduler.ask("end", faults=[Fault(POSTPROCESS, OSError("no room"))])
        assert (answer.success, answer.message) == (False, f"OSError: no room. {BEFORE_UPDATE}")
        assert answer.held == before

    def test_is_post_loaded_where_no_call_has_done_that(self, scheduler, new):
        post_load = [Fault(POST_LOAD, OSError("no room"))]
        scheduler.ask("begin")
        assert "no room" in scheduler.ask("end", faults=post_load).message
        scheduler.ask("begin")
        assert scheduler.ask("tensor", new).success
        assert scheduler.ask("end", faults=post_load).success

    def test_that_nobody_waits_for_raises_and_is_closed(self, scheduler, before):
        scheduler.call("begin")
        answer = scheduler.call("end", run_post_load=False, faults=[Fault(POSTPROCESS, OSError("no room"))])
        assert type(answer.raised) is WeightUpdateError
        assert "no room" in str(answer.raised)
        assert answer.held == before

    def test_whose_end_quantizes_what_has_waited_and_fails_goes_back(self, scheduler, new, before):
        scheduler.ask("begin")
        assert scheduler.ask("tensor", new).success
        answer = scheduler.ask("end", faults=out_of_memory("finish", after=1))
        assert (answer.success, answer.message) == (False, f"StagingMemoryError: memory ran out. {BEFORE_UPDATE}")
        assert answer.held == before

    def test_that_cannot_be_opened_is_answered_at_its_end_and_the_next_one_succeeds(self, scheduler, new, before):
        assert scheduler.ask("begin", faults=out_of_memory("__init__")).held == before
        call = scheduler.ask("tensor", new)
        assert not call.success
        assert "memory ran out" in call.message
        answer = scheduler.ask("end")
        assert (answer.success, answer.message) == (False, f"StagingMemoryError: memory ran out. {BEFORE_UPDATE}")
        assert answer.held == before
        scheduler.ask("begin")
        assert scheduler.ask("tensor", new).success
        answer = scheduler.ask("end")
        assert answer.success
        assert [held.is_open for held in answer.held] == [False, False]
        assert answer.held != before

    def test_end_without_an_update_is_one_of_its_own(self, scheduler, before):
        """What is served is not quantized once more."""
        answer = scheduler.call("end", run_post_load=True)
        assert answer.raised is None
        assert answer.held == before

    def test_of_which_a_part_came_stays_one(self, scheduler, new, before):
        scheduler.ask("begin")
        assert scheduler.ask("tensor", new, names=r"layers\.1\.self_attn\.q_proj").success
        answer = scheduler.call("end", run_post_load=False)
        assert type(answer.raised) is PartialUpdateError
        assert "model.layers.1.self_attn.qkv_proj.weight (1 of 1 units)" in str(answer.raised)
        assert str(answer.raised).endswith(f" {BEFORE_UPDATE}")
        assert answer.held[0] == before[0]

    def test_goes_on_after_a_call_that_fails_and_its_answer_has_the_notes_of_what_went_wrong(self, scheduler, new):
        error = OSError("cannot be read.")
        error.add_note("Of tensor x.")
        scheduler.ask("begin")
        answer = scheduler.call("tensor", new, faults=[Fault(LOAD, error)])
        assert (answer.success, answer.message) == (False, f"OSError: cannot be read. {BEFORE_CALL}\nOf tensor x.")
        assert scheduler.ask("tensor", new).success
        assert scheduler.ask("end").success

    def test_keeps_what_waited_before_a_call_that_fails(self, scheduler, checkpoint):
        """DeepSeek fuses two tensors itself: the first waits for the second, whose call fails once it has written."""
        held = scheduler.start(checkpoint("deepseek_v3"), checkpoint("qwen3"), context_length=4096).held
        new = checkpoint("deepseek_v3", seed=SEED)
        scheduler.ask("begin")
        assert scheduler.ask("tensor", new, names="q_a_proj").success
        answer = scheduler.ask("tensor", new, names="kv_a_proj", faults=[Fault(KEEP, OUT_OF_MEMORY)])
        assert not answer.success
        assert [model.tensors for model in answer.held] == [model.tensors for model in held]
        assert scheduler.ask("tensor", new, names="kv_a_proj").success
        assert scheduler.ask("end").success

    def test_that_a_trainer_has_left_does_not_mix_with_a_folder(self, scheduler, checkpoint, new):
        """Halves of two fused weights wait for the others, which the folder has, before and after its own."""
        fresh = [model.tensors for model in scheduler.ask("disk", new).held]
        scheduler.ask("begin")
        left = r"layers\.0\.mlp\.gate_proj|layers\.1\.mlp\.up_proj"
        assert scheduler.ask("tensor", checkpoint("qwen3", seed=2), names=left).success
        assert scheduler.ask("disk", new).success
        answer = scheduler.ask("end")
        assert answer.success, answer.message
        assert [model.tensors for model in answer.held] == fresh

    def test_of_one_model_leaves_the_other(self, scheduler, new, before):
        for selector, changes in (("draft", (False, True)), ("target", (True, True))):
            scheduler.ask("begin", selector=selector)
            assert scheduler.ask("tensor", new, selector=selector).success
            answer = scheduler.ask("end")
            assert answer.success
            assert tuple(now.tensors != then.tensors for now, then in zip(answer.held, before, strict=True)) == changes


DISTRIBUTED = pytest.param("distributed", marks=SESSIONS)
IPC = pytest.param("ipc", marks=SESSIONS)
"""Earlier releases ask CUDA for the device whose weights come."""


@pytest.mark.parametrize("function", ["__init__", "finish"])
@pytest.mark.parametrize("call", ["tensor", DISTRIBUTED, IPC])
def test_call_whose_update_fails_at_either_end_is_answered(call, function, scheduler, new, before):
    answer = scheduler.call(call, new, faults=out_of_memory(function))
    assert (answer.success, answer.message) == (False, f"StagingMemoryError: memory ran out. {BEFORE_UPDATE}")
    assert answer.held == before
    answer = scheduler.call(call, new)
    assert answer.success, answer.message
    assert answer.held != before


def test_interrupt_is_not_made_an_answer(scheduler, new):
    assert type(scheduler.call("tensor", new, faults=[Fault(LOAD, KeyboardInterrupt())]).raised) is KeyboardInterrupt


class TestFromDisk:
    """Upstream reads "the original weights" where it fails, from a path that need not be the one of what is served."""

    @pytest.mark.parametrize(
        "faults",
        [
            pytest.param(out_of_memory("__init__"), id="begin"),
            pytest.param(out_of_memory("finish"), id="end"),
            pytest.param([Fault(KEEP, OUT_OF_MEMORY, after=5)], id="worker"),
            # What upstream would read next is not the original weights, but the new ones.
            pytest.param([Fault(f"{UPDATE}.finish", OUT_OF_MEMORY, times=1)], id="end, once"),
        ],
    )
    def test_failure_goes_back_to_the_weights_and_the_path_before(self, faults, scheduler, checkpoint, old, new):
        served = scheduler.call("tensor", new).held
        answer = scheduler.call("disk", checkpoint("qwen3", seed=2), load_format="auto", faults=faults)
        assert not answer.success
        assert answer.message.startswith("Failed to update weights: ")
        assert "memory ran out" in answer.message
        assert answer.message.count(BEFORE_UPDATE) == 1
        assert answer.held == served
        assert answer.held[0].path == str(old)

    def test_folder_without_weights_leaves_the_path_before(self, scheduler, old, before):
        answer = scheduler.call("disk", old.parent / "mistyped", load_format="auto")
        assert not answer.success
        assert answer.message.startswith("Failed to update weights: Failed to get weights iterator: ")
        assert answer.message.endswith(f". {BEFORE_UPDATE}")
        assert answer.held == before

    def test_error_that_upstream_raises_leaves_the_path_before(self, scheduler, new, before):
        answer = scheduler.call("disk", new, load_format="none at all")
        assert answer.raised is None
        assert not answer.success
        assert answer.message.startswith("Failed to update weights: ValueError: ")
        assert answer.message.endswith(f". {BEFORE_UPDATE}")
        assert answer.held == before

    def test_success_leaves_the_new_path(self, scheduler, new):
        answer = scheduler.call("disk", new, load_format="auto")
        assert answer.success
        assert answer.held[0].path == str(new)


def send(scheduler, way, folder, faults=()):
    """Update all models by one request, or a session with one call; the last answer."""
    if way != "tensor":
        return scheduler.ask(way, folder, faults=faults)
    scheduler.ask("begin")
    called = scheduler.ask("tensor", folder, faults=faults)
    ended = scheduler.ask("end")
    assert called.success == ended.success
    return ended


@pytest.mark.parametrize("way", ["disk", pytest.param("tensor", marks=SESSIONS), IPC])
@pytest.mark.parametrize("failing", ["target", "draft"])
def test_target_and_draft_go_back_together(failing, way, scheduler, old, new, before):
    """The one that fails does so when it has been written to."""
    answer = send(scheduler, way, new, out_of_memory("_refuse_misfits", after=int(failing == "draft")))
    assert not answer.success
    assert BEFORE_UPDATE in answer.message
    assert answer.held == before
    answer = send(scheduler, way, new)
    assert answer.success, answer.message
    target, draft = answer.held
    assert target.tensors == draft.tensors != before[0].tensors
    assert [held.is_open for held in answer.held] == [False, False]
    assert [held.path for held in answer.held] == [str(new if way == "disk" else old)] * 2


def replaced_units(printed):
    """Of each update of one model."""
    return re.findall(r"weight update: (\d+) units of \d+ layers replaced", printed)


def test_target_and_draft_are_updated_together_and_one_answer_tells_of_both(scheduler, checkpoint, old, new):
    """The draft has a layer less. SGLang answers what the draft's update said, the last of the two."""
    shallow = checkpoint("qwen3", seed=2, overrides=(("num_hidden_layers", LAYERS - 1),))
    _, draft = scheduler.start(old, shallow).held
    printed = len(scheduler.printed())
    whole, lacking = scheduler.ask("disk", new), scheduler.ask("disk", shallow)
    assert whole.success
    assert "Nothing took" not in whole.message
    assert lacking.success
    if BEGIN not in releases.absent():
        # Releases before those with sessions keep to themselves what the draft's update has said.
        assert f"model.layers.{LAYERS - 1}.mlp.down_proj" in lacking.message
    assert replaced_units(scheduler.printed()[printed:]) == ["12", "8", "8", "8"]
    assert lacking.held[1].tensors == draft.tensors
    assert lacking.held[0].tensors == whole.held[0].tensors | draft.tensors


@SESSIONS
def test_prediction_layer_is_updated_with_its_target(scheduler, checkpoint):
    """It has the target's embeddings and head, in the same memory."""
    layer = (("num_nextn_predict_layers", 1),)
    old, new = (checkpoint("deepseek_v3", overrides=layer, seed=seed) for seed in (0, SEED))
    fields = {"speculative_algorithm": "EAGLE", "context_length": 4096}
    fresh = [model.tensors for model in scheduler.start(new, new, **fields).held]
    served = [model.tensors for model in scheduler.start(old, old, **fields).held]
    for way, folder, expected in (("disk", new, fresh), ("tensor", old, served), ("tensor", new, fresh)):
        answer = send(scheduler, way, folder)
        assert answer.success, answer.message
        assert [model.tensors for model in answer.held] == expected
    answer = send(scheduler, "disk", old, out_of_memory("_refuse_misfits", after=1))
    assert not answer.success
    assert [model.tensors for model in answer.held] == fresh


def test_target_goes_back_where_the_draft_cannot_be_updated(scheduler, checkpoint, old, new):
    """Both are read from the folder that is sent, and the draft is narrower."""
    before = scheduler.start(old, checkpoint("qwen3", overrides=(("hidden_size", 64),))).held
    printed = len(scheduler.printed())
    answer = scheduler.ask("disk", new)
    assert not answer.success
    assert answer.message.endswith(BEFORE_UPDATE)
    assert answer.held == before
    assert replaced_units(scheduler.printed()[printed:]) == ["12"]


def test_draft_that_is_not_streamed_takes_its_target_along(scheduler, checkpoint, old, new):
    narrow = checkpoint("qwen3", overrides=(("hidden_size", 64),))
    served = scheduler.start(old, narrow, speculative_draft_model_quantization="unquant").held
    assert {held.tensors["model.layers.0.mlp.down_proj.weight"].dtype for held in served} == {
        "torch.float8_e4m3fn",
        "torch.bfloat16",
    }
    answer = scheduler.ask("disk", new)
    assert not answer.success
    assert BEFORE_UPDATE not in answer.message
    assert answer.held[0] == served[0]


@pytest.fixture
def direct(scheduler, checkpoint, tmp_path):
    """A direct update of a layer that stock quantized, with values of a dtype; what was sent, the answer, before."""
    path = checkpoint("qwen3", overrides=(("architectures", ("RepackingForCausalLM",)),))
    before, _ = scheduler.start(path, path).held
    scale, weight = (f"model.layers.0.self_attn.o_proj.weight{suffix}" for suffix in ("_scale", ""))

    def run(dtype):
        sent = {
            scale: torch.full(before.tensors[scale].shape, 2.0),
            weight: torch.ones(before.tensors[weight].shape).to(dtype),
        }
        save_file(sent, tmp_path / "sent.safetensors")
        return sent, scheduler.call("tensor", tmp_path, load_format="direct"), before

    return run


def test_direct_update_gives_stock_fp8_values_and_scales(direct):
    sent, answer, before = direct(torch.float8_e4m3fn)
    assert answer.success, answer.message
    after = answer.held[0].tensors
    assert {name for name in after if after[name] != before.tensors[name]} == set(sent)
    assert {name: after[name].sha256 for name in sent} == {name: hash_of(values) for name, values in sent.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_direct_update_refuses_to_have_stock_cast_to_fp8(dtype, direct):
    _, answer, before = direct(dtype)
    assert not answer.success
    assert answer.message.startswith("model.layers.0.self_attn.o_proj.weight was quantized by stock SGLang")
    assert answer.held[0] == before


def test_answer_tells_of_all_models_what_upstream_keeps_of_the_last():
    together = Together()
    together.joined(Outcome(unused=["a", "b"], untouched=["x"], advice="Rename."))
    told = together.joined(Outcome(unused=["b", "c"], untouched=["y"]))
    assert told == Outcome(unused=["b"], untouched=["x", "y"], advice="Rename.")
    # One that is not streamed may have taken any.
    together.joined(Outcome())
    assert together.joined(Outcome(unused=["b"])).unused == []
    assert not together.failed
    together.joined(Outcome("no room"))
    assert together.failed
