# SPDX-License-Identifier: Apache-2.0
"""The parts of a weight update that need no SGLang: groups of tensors, derived tensors, what is remembered how long."""

from __future__ import annotations

import gc
import threading
from types import SimpleNamespace

import pytest
import torch
from core.pipelined import InThreads

from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.cpu_reference.workers import Workers
from sglang_overlay.errors import WeightUpdateError
from sglang_overlay.load.updatable_layer import UpdatableLayer
from sglang_overlay.update import model as known_models
from sglang_overlay.update.model import UpdatableModel
from sglang_overlay.update.tensor_attributes import TensorAttributes
from sglang_overlay.update.tensor_groups import TensorGroups
from sglang_overlay.update.undo import UndoLog
from sglang_overlay.update.update_sources import UpdateSources
from sglang_overlay.update.weight_update import WeightUpdate

MLA = ["model.layers.0.self_attn.fused_qkv_a_proj_with_mqa", "model.layers.0.self_attn.o_proj"]
Q, KV = "model.layers.0.self_attn.q_a_proj.weight", "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"


def names(weights):
    return [name for name, _ in weights]


def test_tensors_that_only_load_together_wait_for_each_other():
    groups = TensorGroups(MLA, StagingAccount())
    assert names(groups.complete([(Q, torch.ones(2)), ("model.norm.weight", torch.ones(2))])) == ["model.norm.weight"]
    assert groups.waiting == ["model.layers.0.self_attn.fused_qkv_a_proj_with_mqa.weight"]
    assert names(groups.complete([(KV, torch.ones(2))])) == [Q, KV]
    assert groups.waiting == []


def test_waiting_tensor_outlives_its_senders_buffer():
    groups, buffer = TensorGroups(MLA, StagingAccount()), torch.ones(2)
    list(groups.complete([(Q, buffer)]))
    buffer.zero_()
    ((_, held), _) = groups.complete([(KV, torch.ones(2))])
    assert torch.equal(held, torch.ones(2))


def test_what_waits_is_counted_and_what_completes_is_not_copied():
    account, last = StagingAccount(), torch.ones(2)
    groups = TensorGroups(MLA, account)
    list(groups.complete([(Q, torch.ones(4)), (Q, torch.ones(3))]))
    assert (account.held, account.peak) == (12, 16)
    handed = dict(groups.complete([(KV, last)]))
    assert handed[KV] is last
    assert torch.equal(handed[Q], torch.ones(3))
    assert account.held == 0


def test_what_is_no_tensor_waits_for_nothing():
    entries = [("model.layers.0.self_attn.q_a_proj.note", None)]
    assert list(TensorGroups(MLA, StagingAccount()).complete(entries)) == entries


def test_what_is_no_tensor_is_not_lent():
    sources = UpdateSources()
    for entry in (None, "text", torch.ones(2).to_sparse()):
        sources.lend(entry)
    assert not sources.is_lent(torch.ones(2))


def test_model_that_does_not_fuse_them_gets_each_at_once():
    groups = TensorGroups(["model.layers.0.self_attn.q_a_proj"], StagingAccount())
    assert names(groups.complete([(Q, torch.ones(2))])) == [Q]


@pytest.fixture
def attention():
    module = torch.nn.Module()
    module.w_kc = torch.ones(2, 3)
    return module


def test_derived_tensor_that_upstream_makes_anew_moves_into_the_old_memory(attention):
    old, attributes = attention.w_kc, TensorAttributes(attention)
    attention.w_kc = torch.full((2, 3), 2.0)
    attributes.keep_memory(UndoLog())
    assert attention.w_kc is old
    assert torch.equal(old, torch.full((2, 3), 2.0))


def test_derived_tensor_of_a_weight_that_did_not_come_stays(attention):
    old, attributes = attention.w_kc, TensorAttributes(attention)
    attention.w_kc = torch.empty(2, 3, device="meta")
    attributes.keep_memory(UndoLog())
    assert attention.w_kc is old
    assert torch.equal(old, torch.ones(2, 3))


def test_derived_tensor_of_a_weight_that_did_not_come_stays_whatever_its_dtype(attention):
    old, attributes = attention.w_kc, TensorAttributes(attention)
    attention.w_kc = torch.empty(2, 3, device="meta", dtype=torch.bfloat16)
    assert attributes.keep_memory(UndoLog()) == []
    assert attention.w_kc is old


@pytest.mark.parametrize("new", [torch.zeros(3, 3), torch.zeros(2, 3, dtype=torch.bfloat16)], ids=["shape", "dtype"])
def test_derived_tensor_of_another_form_is_told_and_keeps_its_old_memory(attention, new):
    old, attributes = attention.w_kc, TensorAttributes(attention)
    attention.w_kc = new
    assert attributes.keep_memory(UndoLog()) == ["w_kc"]
    assert attention.w_kc is old


def test_derived_tensors_in_lists_and_dicts_that_are_made_anew_move_as_well(attention):
    attention.scales = {"k": [torch.ones(2), torch.ones(3)]}
    old, attributes = attention.scales["k"], TensorAttributes(attention)
    attention.scales = {"k": [torch.full((2,), 2.0), torch.empty(3, device="meta")]}
    attributes.keep_memory(UndoLog())
    assert [now is before for now, before in zip(attention.scales["k"], old, strict=True)] == [True, True]
    assert torch.equal(old[0], torch.full((2,), 2.0))
    assert torch.equal(old[1], torch.ones(3))


@pytest.fixture
def repacked():
    """A model with one layer, whose fp8 weight cannot be replaced, and what updates know of that."""
    model, placeholder = torch.nn.Module(), torch.nn.Parameter(torch.empty(2, 3, device="meta"), requires_grad=False)
    placeholder.weight_loader = lambda parameter, tensor: parameter.data.copy_(tensor)
    model.load_weights = list
    model.proj = torch.nn.Module()
    model.proj.weight = torch.nn.Parameter(torch.zeros(2, 3).to(torch.float8_e4m3fn), requires_grad=False)
    plan = SimpleNamespace(
        registered=lambda _layer, _placeholders: None, scale_placeholders=lambda *_: {}, fills=frozenset()
    )
    return model, UpdatableLayer("proj", model.proj, plan, {"weight": placeholder})


def test_loading_that_leaves_a_tensor_without_data_is_an_error_that_names_it(repacked):
    model, layer = repacked
    expected = pytest.raises(WeightUpdateError, match=r"these tensors hold no data: proj\.derived\[0\]")
    with expected, WeightUpdate([layer]).loading(model):
        model.proj.derived = (model.proj.weight.data.t().contiguous(),)


def test_loading_that_changes_a_derived_tensors_form_is_an_error_that_names_it(repacked):
    model, layer = repacked
    model.proj.derived = torch.ones(2)
    expected = pytest.raises(WeightUpdateError, match=r"in another form, .*: proj\.derived\. ")
    with expected, WeightUpdate([layer]).loading(model):
        model.proj.derived = torch.ones(3)


def test_loading_that_fails_raises_what_failed_and_keeps_derived_tensors(repacked):
    model, layer = repacked
    model.proj.derived = old = torch.ones(2)

    def fail():
        model.proj.derived = torch.ones(3)
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"), WeightUpdate([layer]).loading(model):
        fail()
    assert model.proj.derived is old


def test_loading_leaves_what_a_model_had_noted_down_of_the_parameters_that_are_served(repacked):
    model, layer = repacked
    model.routed_experts_weights_of_layer = noted = {0: [model.proj.weight]}
    with WeightUpdate([layer]).loading(model):
        model._cached_params_dict = dict(model.named_parameters())
        model.routed_experts_weights_of_layer = {0: [torch.ones(2, 3)]}
    assert model.routed_experts_weights_of_layer is noted
    assert not hasattr(model, "_cached_params_dict")


def test_update_that_cannot_be_opened_leaves_no_threads(repacked):
    def fail(_layer, _placeholders):
        raise torch.OutOfMemoryError("no room")

    _, layer = repacked
    layer.plan.registered = fail
    before, known = set(threading.enumerate()), UpdatableModel([layer], {})
    with pytest.raises(torch.OutOfMemoryError):
        known.begin(InThreads(Workers(2)))
    assert set(threading.enumerate()) == before
    assert known.open is None


def test_weight_that_cannot_be_replaced_is_refused_under_its_own_name(repacked):
    model, layer = repacked
    opened = WeightUpdate([layer])
    assert opened.takes("proj.weight")
    assert not opened.takes("proj.weight_scale")
    with pytest.raises(WeightUpdateError, match=r"proj\.weight was repacked"), opened.loading(model):
        model.proj.weight.data.copy_(torch.ones(2, 3))
    assert not model.proj.weight.float().any()


def test_part_that_waits_for_the_rest_of_its_weight_outlives_a_call_that_fails(repacked):
    """The call that fails brings the rest."""
    model, layer = repacked
    layer.is_deleted = True
    opened = WeightUpdate([layer])

    def call(row, error=None):
        opened.begin_call()
        with opened.loading(model):
            model.proj.weight.data[row].copy_(torch.ones(3))
            if error is not None:
                raise error
        opened.note_repeated()
        opened.keep_call()

    call(0)
    with pytest.raises(OSError, match="no room"):
        call(1, OSError("no room"))
    opened.undo_call()
    call(1)
    opened.finish(model)
    assert opened.replaced == ["proj"]


def test_what_is_remembered_of_a_model_goes_with_it():
    gc.collect()
    model = torch.nn.Linear(2, 2)
    known_models.remember(model, UpdatableModel([], {}))
    assert known_models.updatable(model) is not None
    remembered = len(known_models._models)
    del model
    gc.collect()
    assert len(known_models._models) == remembered - 1
