# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from sglang_overlay.core.shortage import is_shortage, shortage_explained
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.errors import StagingMemoryError

MIB = 1 << 20


@pytest.fixture
def account():
    made = StagingAccount()
    made.store(3 * MIB)
    made.add(2 * MIB)
    made.add(-MIB)
    return made


def test_shortage_is_told_with_what_was_needed_and_what_is_allocated(account):
    with pytest.raises(StagingMemoryError) as failure, shortage_explained("to stage a piece of a.weight", MIB, account):
        torch.empty(1 << 60, dtype=torch.uint8)
    text = str(failure.value)
    assert "1.0 MiB were needed to stage a piece of a.weight" in text
    assert "3.0 MiB of fp8 weights and scales" in text
    assert "held 1.0 MiB of staging (at most 2.0 MiB so far)" in text
    assert is_shortage(failure.value.__cause__)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("no"), OSError("no such file")])
def test_other_errors_pass_as_they_are(error, account):
    with pytest.raises(type(error)) as failure, shortage_explained("", 0, account):
        raise error
    assert failure.value is error


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_every_device_says_it_in_its_own_way(error):
    assert is_shortage(error)
