# SPDX-License-Identifier: Apache-2.0
"""The parts of a weight update that need no SGLang: groups of tensors, derived tensors, what is remembered how long."""

from __future__ import annotations

import gc

import pytest
import torch

from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.upstream import update
from sglang_overlay.upstream.update import TensorGroups, UpdatableModel

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


def test_model_that_does_not_fuse_them_gets_each_at_once():
    groups = TensorGroups(["model.layers.0.self_attn.q_a_proj"], StagingAccount())
    assert names(groups.complete([(Q, torch.ones(2))])) == [Q]


@pytest.fixture
def attention():
    module = torch.nn.Module()
    module.w_kc = torch.ones(2, 3)
    return module


def test_derived_tensor_that_upstream_makes_anew_moves_into_the_old_memory(attention):
    old, attributes = attention.w_kc, update._TensorAttributes(attention)
    attention.w_kc = torch.full((2, 3), 2.0)
    attributes.keep_memory()
    assert attention.w_kc is old
    assert torch.equal(old, torch.full((2, 3), 2.0))


def test_derived_tensor_of_a_weight_that_did_not_come_stays(attention):
    old, attributes = attention.w_kc, update._TensorAttributes(attention)
    attention.w_kc = torch.empty(2, 3, device="meta")
    attributes.keep_memory()
    assert attention.w_kc is old
    assert torch.equal(old, torch.ones(2, 3))


def test_what_is_remembered_of_a_model_goes_with_it():
    model = torch.nn.Linear(2, 2)
    update.remember(model, UpdatableModel([], {}))
    assert update.updatable(model) is not None
    remembered = len(update._models)
    del model
    gc.collect()
    assert len(update._models) == remembered - 1
