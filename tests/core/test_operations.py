# SPDX-License-Identifier: Apache-2.0
"""What the tests count as an operation."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from core.operations import operations


def test_views_are_not_counted_and_allocations_are_no_launches():
    values = torch.ones(4, 6)
    found = operations(lambda: torch.empty(4).copy_(values.t()[2:3].view(-1).narrow(0, 0, 4)).add_(1))
    assert found.seen == {"aten.empty.memory_format": 1, "aten.copy_.default": 1, "aten.add_.Tensor": 1}
    assert (found.total, found.launches) == (3, 2)


def test_uploads_and_waits_are_told():
    with FakeTensorMode():
        host, device = torch.ones(4), torch.ones(4, device="cuda")
        assert operations(lambda: device.copy_(host)).uploads == 1
        assert operations(lambda: host.to("cuda", torch.bfloat16)).uploads == 1
        assert operations(lambda: device.cpu()).waits == 1
        found = operations(lambda: device.add_(1))
    assert (found.uploads, found.waits) == (0, 0)
