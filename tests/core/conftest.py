# SPDX-License-Identifier: Apache-2.0
"""Examples of streaming hold whatever does it: the plain stream that the patch series has, and the overlay's.

And whatever is written to: a plain parameter is watched by itself (``captured_views.py``), for one of upstream's own
class every operation is looked at (``capture.py``).
"""

from __future__ import annotations

import pytest
import torch

from core import kernels, pipelined, streams


class UpstreamParameter(torch.nn.Parameter):
    """Stands for the classes of parameters that upstream has."""


def _parameter(values):
    parameter = torch.nn.Parameter(values, requires_grad=False)
    parameter.__class__ = UpstreamParameter
    return parameter


KINDS = {
    "plain": lambda patch: None,
    "pipelined": pipelined.use,
    "by kernels": kernels.use_kernels,
    "of upstream's class": lambda patch: patch.setattr(streams, "make_parameter", _parameter),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in ("test_layer", "test_stream"):
        metafunc.parametrize("kind_of_stream", KINDS, indirect=True)


@pytest.fixture(autouse=True)
def kind_of_stream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    KINDS[getattr(request, "param", "plain")](monkeypatch)
