# SPDX-License-Identifier: Apache-2.0
"""Loads on stand-in GPUs that tests share: importing SGLang with one takes longer than loading a tiny model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from harness.streamed import assert_streamed_by_sglang
from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadResult, LoadWorkers

from sglang_overlay.hooks import built_in
from standin.checkpoints import with_zeros
from standin.fork import PREPARE, Context
from standin.gpus import SERVER_ARGS, environ

DEVICES = 2


@dataclass(frozen=True)
class Surroundings:
    """What a process has from its start: a GPU, packages, and variables that SGLang reads when it is imported."""

    gpu: str
    packages: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    memory_saver: bool = False

    def environ(self) -> dict[str, str]:
        made = environ(self.gpu, devices=DEVICES, packages=self.packages, memory_saver=self.memory_saver)
        return {**made, **dict(self.variables)}


OnGpu = Callable[..., LoadWorkers]


@pytest.fixture(scope="session")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnGpu]:
    """``on_gpu("h200", environ={...})``: workers with two such GPUs, kept for the session."""
    with ExitStack() as stack:

        @cache
        def workers(gpu: str, variables: tuple[tuple[str, str], ...]) -> LoadWorkers:
            surroundings = {**environ(gpu, devices=DEVICES), **dict(variables)}
            return stack.enter_context(LoadWorkers(tmp_path_factory.mktemp(gpu), surroundings, Context(), PREPARE))

        yield lambda gpu, **variables: workers(gpu, tuple(sorted(variables.items())))


@pytest.fixture(scope="session")
def loaded(on_gpu: OnGpu) -> Callable[..., LoadResult]:
    """``loaded("h200", path, streaming="0", ...)``: one load, which tests with the same wish share."""

    @cache
    def once(gpu: str, job: _Job) -> LoadResult:
        return on_gpu(gpu).load(job.job)

    def load(gpu: str, path: Path, streaming: str = "require", **fields: Any) -> LoadResult:
        arguments = {**SERVER_ARGS, **fields.pop("server_args", {})}
        job = LoadJob(path, streaming, device="cuda", server_args=arguments, **fields)
        if streaming != "require" or not built_in.streams_itself():
            return once(gpu, _Job(job))
        result = once(gpu, _Job(replace(job, streaming="1")))
        assert_streamed_by_sglang(result)
        return result

    return load


@pytest.fixture(scope="module")
def loads_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Surroundings, LoadJob], LoadResult]]:
    """``loads_in(surroundings, job)``. One process at a time: each takes a gigabyte or two."""
    held: dict[Surroundings, LoadWorkers] = {}

    def close() -> None:
        for workers in held.values():
            workers.close()
        held.clear()

    def load(there: Surroundings, job: LoadJob) -> LoadResult:
        if there not in held:
            close()
            held[there] = LoadWorkers(tmp_path_factory.mktemp(there.gpu), there.environ(), Context(), PREPARE)
        return held[there].load(job)

    yield load
    close()


class _Job:
    """A job that can be a key: its fields are data."""

    def __init__(self, job: LoadJob) -> None:
        self.job = replace(job)

    def __hash__(self) -> int:
        return hash(repr(self.job))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Job) and self.job == other.job


@pytest.fixture(scope="session")
def zeros(checkpoint: Callable[..., Path], checkpoint_folder: Path) -> Callable[..., Path]:
    """A family's checkpoint with rows and experts of zeros."""

    def build(family: str, **fields: Any) -> Path:
        path = checkpoint(family, files=3, assignment="round_robin", **fields)
        return with_zeros(path, checkpoint_folder / f"{path.name}-zeros")

    return build
