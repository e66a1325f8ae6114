# SPDX-License-Identifier: Apache-2.0
"""One process that has SGLang imported, for all plans of a session."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from sglang_overlay.hooks import releases
from sglang_overlay.offline.plan import planner
from sglang_overlay.offline.plan.job import Job, PlannedLoad
from sglang_overlay.offline.plan.planner import Plan, Request, collect
from sglang_overlay.offline.plan.process import Planners
from sglang_overlay.offline.simulation import FIRST_RELEASE, can_simulate


@pytest.fixture(scope="session", autouse=True)
def plannable() -> None:
    """Skip what needs a release that can be planned."""
    if not can_simulate():
        pytest.skip(f"SGLang {releases.installed()} is older than {FIRST_RELEASE}, the first that can be planned")


@pytest.fixture(scope="session")
def planners() -> Iterator[Planners]:
    with Planners(2) as found:
        yield found


@pytest.fixture(scope="session")
def simulated(planners) -> Callable[[Job], PlannedLoad]:
    return lambda job: next(planners.run([job]))


@pytest.fixture(scope="session")
def planned(planners) -> Callable[[Request], Plan]:
    return lambda request: collect(request, planners.run(request.jobs()))


@pytest.fixture
def planned_here(planners, monkeypatch) -> None:
    """The command plans in the session's process."""
    monkeypatch.setattr(planner, "Planners", lambda _workers: contextlib.nullcontext(planners))
