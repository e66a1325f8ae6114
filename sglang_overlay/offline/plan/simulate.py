# SPDX-License-Identifier: Apache-2.0
"""Load one rank of a model without memory, in one mode, and report what it would have needed."""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from sglang_overlay.core.executor import Executor
from sglang_overlay.core.quantizers import UnitQuantizer
from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.hooks.catalogue import STREAMING
from sglang_overlay.hooks.hook import State, inspect_hooks
from sglang_overlay.load.model_load import ModelLoad, under_way
from sglang_overlay.load.model_tensors import stored_bytes, tensors_of
from sglang_overlay.offline.plan.account import CUDA_BLOCK, Account, AllocatedLate, AllocatedMemory, TouchedMemory
from sglang_overlay.offline.plan.checkpoint import Checkpoint, WeightFile, arranged, read_headers, read_index
from sglang_overlay.offline.plan.from_config import from_config
from sglang_overlay.offline.plan.host import HeldTensors, HostMemory
from sglang_overlay.offline.plan.job import WHOLE_LAYERS, DeviceWork, Job, PlannedLoad
from sglang_overlay.offline.plan.layers import whole_layers
from sglang_overlay.offline.plan.replay import Replaying
from sglang_overlay.offline.plan.serving import serving
from sglang_overlay.offline.plan.weightless import EmptyFile, weightless
from sglang_overlay.offline.simulation import cuda_kernels, loading_in_this_thread, simulated_rank
from sglang_overlay.settings import Mode as StreamingMode
from sglang_overlay.settings import Settings

_KEPT_TENSORS = 8

Weights = Iterator[tuple[str, torch.Tensor]]


class NotHookedError(StreamFP8Error):
    """SGLang is not hooked, so nothing would be streamed."""


@dataclass(frozen=True)
class Loaded:
    """A model that has been loaded without memory; valid inside ``loaded``.

    Attributes:
        model, load, device: as of a real load.
        summary: what the load needed.
        weights: reads the checkpoint once more; calls its argument with each name and tensor first.
        work: counts the device's work from now on.
    """

    model: torch.nn.Module
    load: ModelLoad
    device: torch.device
    summary: PlannedLoad
    weights: Callable[[Callable[[str, torch.Tensor], None]], Weights]
    work: DeviceWork


def simulate(job: Job) -> PlannedLoad:
    """Load one rank on tensors without memory.

    Raises:
        StreamFP8Error: the checkpoint's headers cannot be read, or the load would fail (for example, a missing tensor).
    """
    with loaded(job) as found:
        return found.summary


@contextmanager
def loaded(job: Job) -> Iterator[Loaded]:
    """Load one rank as ``simulate`` does, and keep it until the block ends.

    Raises:
        StreamFP8Error: as of ``simulate``.
    """
    checkpoint = checkpoint_of(job.model, job.from_config)
    _check_hooked()
    account, held = _account(job), HeldTensors()
    device = torch.device("cuda", 0) if job.device == "cuda" else torch.device("cpu")
    load = _load(job, device, account)
    weights = partial(_weights, job, checkpoint, account, held)
    with _config_folder(job.model) as folder, ExitStack() as stack:
        rank = stack.enter_context(simulated_rank(folder, job.layout, job.rank, dict(job.server_args)))
        stack.enter_context(_modelled(job, account.work))
        stack.enter_context(weightless(account))
        with under_way(load), closing(load):
            model = rank.load(device, lambda: weights(load.see))
            load.check(model, rank.model_config)
        account.finish()
        host = HostMemory.of(_read_by(job, checkpoint), held.peak)
        summary = _summary(job, checkpoint, account, load, model, rank.architecture, host)
        summary = replace(summary, serving=serving(rank, model, summary.final, job.gpus))
        yield Loaded(model, load, device, summary, weights, account.work)


def _check_hooked() -> None:
    """Make sure that SGLang is hooked: otherwise a plan of streaming would be stock's."""
    if not any(found.state is State.ACTIVE for found in inspect_hooks(STREAMING)):
        raise NotHookedError(
            "SGLang has not loaded this package's plugin, so nothing would be streamed: "
            "`python -m sglang_overlay check` says what is wrong"
        )


def _account(job: Job) -> Account:
    if job.device == "cpu":
        return TouchedMemory("cpu")
    return (AllocatedLate if job.mode in WHOLE_LAYERS else AllocatedMemory)("cuda", CUDA_BLOCK)


@cache
def checkpoint_of(model: Path, from_config_alone: bool) -> Checkpoint:  # noqa: FBT001 - part of the cache's key
    """The headers in a folder or, without any, the tensors by ``config.json``, arranged in the index's files if any."""
    if not from_config_alone and model.is_dir() and any(model.glob("*.safetensors")):
        return read_headers(model)
    with _config_folder(model) as folder:
        found = from_config(folder)
    index = None if from_config_alone or not model.is_dir() else read_index(model)
    return found if index is None else arranged(found, index)


@contextmanager
def _config_folder(model: Path) -> Iterator[Path]:
    """A folder that contains the model's ``config.json`` under this name."""
    if model.is_dir():
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(model, Path(folder) / "config.json")
        yield Path(folder)


@contextmanager
def _modelled(job: Job, work: DeviceWork) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(loading_in_this_thread())
        if job.mode in WHOLE_LAYERS:
            stack.enter_context(whole_layers(when_complete=job.mode == "complete_layers"))
        if job.device == "cuda":
            stack.enter_context(cuda_kernels(work))
        yield


def _load(job: Job, device: torch.device, account: Account) -> ModelLoad:
    if job.mode == "stock":
        return ModelLoad(Settings(StreamingMode.OFF), device)
    settings = Settings(StreamingMode.ON, schemes=job.schemes)
    return ModelLoad(settings, device, executor=Replaying(account) if job.device == "cuda" else _NoComputing())


def _read_by(job: Job, checkpoint: Checkpoint) -> list[WeightFile]:
    return checkpoint.read_by(job.order, job.rank % job.layout.tp, job.layout.tp)


def _weights(
    job: Job, checkpoint: Checkpoint, account: Account, held: HeldTensors, see: Callable[[str, torch.Tensor], None]
) -> Weights:
    """Yields names and tensors as SGLang's own iterator does, after ``see`` has seen them."""
    contents = EmptyFile(max(tensor.size for tensor in checkpoint.tensors))
    # Keep some tensors alive: while one of a mapped file lives, later ones are recognized as mapped without a lookup.
    latest: deque[torch.Tensor] = deque(maxlen=_KEPT_TENSORS)
    for file in _read_by(job, checkpoint):
        for header in file.tensors:
            tensor = contents.tensor(header.shape, header.dtype)
            account.read(header.size)
            see(header.name, tensor)
            held.give(tensor, latest)
            yield header.name, tensor
            latest.append(tensor)
    held.finish()


class _NoComputing(Executor):
    """Computes nothing, without threads: the CPU's quantizers need no extra memory, but would read absent values."""

    quantizes_late = True

    def quantizer(self, quantizer: UnitQuantizer) -> UnitQuantizer:
        return _NoQuantizer()


class _NoQuantizer:
    """Fills the outputs with zeros, so that they count as written."""

    def could_be(self, piece: Any, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        return True

    def quantize(self, pieces: Any, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        weight.zero_()
        scale.zero_()
        return torch.zeros(())

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        weight.zero_()
        scale.zero_()
        return torch.zeros(len(values))


def _summary(
    job: Job,
    checkpoint: Checkpoint,
    account: Account,
    load: ModelLoad,
    model: torch.nn.Module,
    architecture: str,
    host: HostMemory,
) -> PlannedLoad:
    return PlannedLoad(
        mode=job.mode,
        rank=job.rank,
        peak=account.peak,
        final=stored_bytes(tensor for _, tensor in tensors_of(model) if tensor.device.type == job.device),
        staging_peak=load.account.peak,
        units=load.record.units,
        direct_units=load.record.direct_units,
        streamed=len(load.record.layers),
        deferred=len(load.fallback.deferred),
        fallback=len(load.fallback.reasons),
        why_none=load.abandoned,
        checkpoint_bytes=checkpoint.size,
        checkpoint_parameters=checkpoint.parameters,
        checkpoint_files=len(checkpoint.files),
        checkpoint_source=checkpoint.source,
        architecture=architecture,
        samples=tuple(account.samples),
        host=host,
        work=replace(account.work),
    )
