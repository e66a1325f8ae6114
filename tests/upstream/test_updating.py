# SPDX-License-Identifier: Apache-2.0
"""Failures of a hooked function itself; test_updates.py has those that real updates bring about."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_overlay.errors import WeightUpdateError
from sglang_overlay.upstream import update, updating
from sglang_overlay.upstream.update import UpdatableModel


class Model(torch.nn.Module):
    def load_weights(self, weights):
        """As each of SGLang's models has it."""


@pytest.fixture
def known():
    """A model with an open session; ``updater`` is what SGLang's method of that name belongs to."""
    model = Model()
    found = UpdatableModel([], {})
    update.remember(model, found)
    found.begin()
    return SimpleNamespace(model=model), found


def fail(_updater, *, run_post_load):
    raise OSError(f"no room, run_post_load={run_post_load}")


def test_session_that_fails_at_its_end_is_closed_and_answered(known):
    updater, found = known
    failures = []
    token = updating._failures.set(failures)
    try:
        updating.end_weight_update(fail, updater, run_post_load=True)
    finally:
        updating._failures.reset(token)
    assert found.open is None
    assert failures == ["OSError: no room, run_post_load=True. All fp8 layers hold their old values."]


def test_session_that_nobody_waits_for_raises_and_is_closed(known):
    updater, found = known
    with pytest.raises(WeightUpdateError, match="no room"):
        updating.end_weight_update(fail, updater, run_post_load=False)
    assert found.open is None
