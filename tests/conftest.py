# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and loads that tests share: both cost seconds, so both are made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from workbench.checkpoints import CheckpointSpec, build
from workbench.loads import LoadWorkers


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where checkpoints are kept; ``STREAMFP8_CHECKPOINTS`` keeps them from one session to the next."""
    kept = os.environ.get("STREAMFP8_CHECKPOINTS")
    return Path(kept) if kept else tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="session")
def checkpoint(checkpoint_folder: Path) -> Callable[..., Path]:
    """``checkpoint("qwen3_moe", files=4, ...)`` builds that checkpoint and returns its folder."""
    return lambda family, **fields: build(CheckpointSpec(family, **fields), checkpoint_folder)


@pytest.fixture(scope="session")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadWorkers]:
    """Processes that load models in real SGLang, one group for each TP size."""
    with LoadWorkers(tmp_path_factory.mktemp("loads")) as group:
        yield group
