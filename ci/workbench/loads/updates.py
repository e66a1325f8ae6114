"""Weight updates of a loaded model, as SGLang's scheduler makes them: a step of ``LoadJob``."""

from __future__ import annotations

import pkgutil
import random
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.loads import devices, rebalance
from workbench.loads.fingerprints import named_tensors
from workbench.loads.rebalance import Rebalance

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from sglang_overlay.observe.memory import MemoryUsage

_MEMORY_INTERVAL_MS = 3.0


@dataclass(frozen=True)
class Update:
    """One update.

    Args:
        source: ``disk``; ``tensor``, ``bucket`` (flattened) or ``direct`` (parameters' own names) in a session.
        checkpoint: where the new weights are. If it has folders ``rank-0`` etc., each rank gets its own.
        names: regular expression; only tensors whose names contain a match are sent.
        calls: number of calls of ``update_weights_from_tensor``, each with its share of the tensors.
        order: of tensors: as in the ``file``, or ``shuffled``, which separates tensors that belong together.
        placement: to which EPLB moves experts after each call (``Rebalance``); empty, it moves none.
        loader: ``package.module.function`` that loads the tensors, one of the job's ``custom_weight_loader``.
        recorder: ``module:function``, a context manager around the update in each rank; its value is ``recorded``.
    """

    source: Literal["disk", "tensor", "bucket", "direct"]
    checkpoint: Path
    names: str = ""
    calls: int = 1
    order: Literal["file", "shuffled"] = "file"
    placement: tuple[int, ...] = ()
    loader: str = ""
    recorder: str = ""


@dataclass(frozen=True)
class UpdateResult:
    """The result of an update on one rank.

    Args:
        success, message: upstream's answer, or the exception.
        moved: tensors whose memory has moved, or that are new or gone.
        memory: of the process during the update.
        seconds: wall time in SGLang, without the sender's part.
        cpu_seconds: processor time of the process's threads in the same calls.
        bucket: bytes of the tensors of the largest call; 0 from disk.
        recorded: the value of the update's ``recorder``.
    """

    success: bool
    message: str
    moved: tuple[str, ...]
    memory: MemoryUsage
    seconds: float
    cpu_seconds: float
    bucket: int
    recorded: Any


def run(runner: Any, update: Update) -> UpdateResult:
    """Update the model of ``runner``, a ``ModelRunner``."""
    from sglang_overlay.observe.memory import MemorySampler, meter_for

    calls = [] if update.source == "disk" else list(_dealt(update, runner.device))
    bucket = max((sum(tensor.nbytes for _, tensor in tensors) for tensors in calls), default=0)
    before = addresses_of(runner.model)
    devices.release_host_memory()
    recorder = pkgutil.resolve_name(update.recorder)() if update.recorder else nullcontext()
    # Until 0.5.15 the runner updates its weights itself.
    updater = _Timed(getattr(runner, "weight_updater", runner))
    with recorder as recorded, MemorySampler(meter_for(runner.device), _MEMORY_INTERVAL_MS) as sampler:
        success, message = _answer(runner, updater, update, calls)
    took = updater.seconds, updater.cpu_seconds
    return UpdateResult(success, message, moved_tensors(before, runner.model), sampler.usage, *took, bucket, recorded)


class _Timed:
    """An updater of SGLang's, with the time that its methods take."""

    def __init__(self, updater: Any) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._updater = updater

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._updater, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin, cpu_begin = time.perf_counter(), time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin
                self.cpu_seconds += time.process_time() - cpu_begin

        return timed


def _answer(runner: Any, updater: Any, update: Update, calls: list[list[tuple[str, torch.Tensor]]]) -> tuple[bool, str]:
    try:
        if update.source == "disk":
            pattern = re.compile(update.names)
            only = {"weight_name_filter": lambda name: bool(pattern.search(name))} if update.names else {}
            answer: tuple[bool, str] = updater.update_weights_from_disk(str(update.checkpoint), "auto", **only)
            return answer
        return _session(runner, updater, update, calls)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


def _session(
    runner: Any, updater: Any, update: Update, calls: list[list[tuple[str, torch.Tensor]]]
) -> tuple[bool, str]:
    """Make all calls in one session, or each by itself if there are no sessions (before 0.5.21)."""
    has_sessions = hasattr(updater, "begin_weight_update")
    if has_sessions:
        updater.begin_weight_update()
    answers = []
    for tensors in calls:
        answers.append(_send(updater, update, tensors))
        if update.placement:
            rebalance.run(runner, Rebalance(update.placement))
    if has_sessions:
        try:
            updater.end_weight_update(run_post_load=not calls)
        except Exception as error:
            answers.append((False, f"{type(error).__name__}: {error}"))
    return all(success for success, _ in answers), "; ".join(message for _, message in answers)


def _send(updater: Any, update: Update, tensors: list[tuple[str, torch.Tensor]]) -> tuple[bool, str]:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    answer: tuple[bool, str]
    if update.source == "bucket":
        bucket = FlattenedTensorBucket(named_tensors=tensors)
        content = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
        answer = updater.update_weights_from_tensor(content, "flattened_bucket")
        content["flattened_tensor"].fill_(0)
        return answer
    load_format = update.loader or ("direct" if update.source == "direct" else None)
    answer = updater.update_weights_from_tensor(tensors, load_format)
    # A trainer reuses its buffers.
    for _, tensor in tensors:
        tensor.fill_(0)
    return answer


def _dealt(update: Update, device: str) -> Iterator[list[tuple[str, torch.Tensor]]]:
    # Copied: writing to a mapped file's pages would count as the update's memory.
    import torch

    own = update.checkpoint / f"rank-{torch.distributed.get_rank()}"
    tensors = [
        (name, tensor.to(device, copy=True))
        for name, tensor in tensors_of(own if own.is_dir() else update.checkpoint)
        if re.search(update.names, name)
    ]
    if update.order == "shuffled":
        random.Random(0).shuffle(tensors)
    size = -(-len(tensors) // update.calls)
    for start in range(0, len(tensors), size):
        yield tensors[start : start + size]


def tensors_of(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and values of every tensor of a checkpoint, in its files' order."""
    from safetensors.torch import load_file

    for file in sorted(checkpoint.glob("*.safetensors")):
        yield from load_file(file).items()


def addresses_of(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Identity and memory address of each tensor."""
    return {name: (id(tensor), tensor.data_ptr()) for _, name, tensor in named_tensors(model)}


def moved_tensors(before: dict[str, tuple[int, int]], model: torch.nn.Module) -> tuple[str, ...]:
    """Names of tensors whose memory has moved since ``before``, or that are new or gone."""
    after = addresses_of(model)
    return tuple(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))
