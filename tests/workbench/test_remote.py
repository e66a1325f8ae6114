"""Loads in a process of their own give what loads of this one give, and say why they failed."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, LoadFailed, LoadWorkers, compare
from workbench.loads.remote import RemoteWorkers
from workbench.releases.environment import CLONE

ENVIRON = {**os.environ, "PYTHONPATH": str(CLONE / "ci")}


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[RemoteWorkers]:
    with RemoteWorkers(Path(sys.executable), ENVIRON, tmp_path / "remote") as workers:
        yield workers


def test_result_is_that_of_a_load_here(
    remote: RemoteWorkers, workers: LoadWorkers, checkpoint: Callable[..., Path]
) -> None:
    job = LoadJob(checkpoint("qwen3"), streaming="require", prompts=PROMPTS)
    assert compare(remote.load(job), workers.load(job)) == []


def test_failed_load_raises_and_the_next_one_works(remote: RemoteWorkers, checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("qwen3")
    with pytest.raises(LoadFailed, match="rank 0 failed"):
        remote.load(LoadJob(path, server_args={"quantization": "no such"}))
    assert remote.load(LoadJob(path, described="sizes")).ranks[0].model_bytes


def test_process_that_ends_says_why(tmp_path: Path) -> None:
    with (
        RemoteWorkers(Path(sys.executable), {**ENVIRON, "PYTHONPATH": ""}, tmp_path) as workers,
        pytest.raises(LoadFailed, match="No module named 'workbench'"),
    ):
        workers.load(LoadJob(tmp_path))
