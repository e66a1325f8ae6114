# SPDX-License-Identifier: Apache-2.0
"""Examples of streaming hold whatever does it: the plain stream that the patch series has, and the overlay's."""

from __future__ import annotations

import pytest

from core import pipelined

KINDS = {"plain": lambda patch: None, "pipelined": pipelined.use}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.module.__name__.rpartition(".")[2] in ("test_layer", "test_stream"):
        metafunc.fixturenames.append("kind_of_stream")
        metafunc.parametrize("kind_of_stream", KINDS, indirect=True)


@pytest.fixture
def kind_of_stream(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    KINDS[request.param](monkeypatch)
