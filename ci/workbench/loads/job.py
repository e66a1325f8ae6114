"""Jobs that :mod:`workbench.loads.loads` sends to its workers, and their results."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sglang_overlay.observe.memory import MemoryUsage
    from workbench.loads.fingerprints import TensorPrint
    from workbench.loads.layouts import WeightLayout
    from workbench.loads.rebalance import Rebalance
    from workbench.loads.sleeping import Sleep
    from workbench.loads.updates import Update

StartMethod = Literal["forkserver", "spawn"]


@dataclass(frozen=True)
class LoadJob:
    """One load of one checkpoint.

    Args:
        checkpoint: folder of the checkpoint.
        streaming: value of ``SGLANG_STREAMFP8`` during the job: ``"0"``, ``"1"``, ``"require"``; None leaves it unset.
            With ``"0"`` no hook is in place.
        quantization: ``"fp8"`` or None, as ``--quantization``.
        tp_size, ep_size, pp_size: as the options of the server; a process for each of ``tp_size * pp_size`` ranks.
        environ: further environment variables during the job, e.g. ``{"SGLANG_SORT_WEIGHT_FILES": "1"}``. Only those
            which SGLang reads at run time work here; for the others see ``LoadWorkers(environ=...)``.
        loader_config: ``--model-loader-extra-config``, e.g. ``{"enable_multithread_load": False}``.
        server_args: further fields of SGLang's ``ServerArgs``.
        updates: weight updates to make after loading, and sleep, in order, before anything is described or generated.
        draft: folder of a draft model (``--speculative-draft-model-path``), which is loaded in place of the target,
            as a speculative worker does it.
        save_sharded_state: folder into which SGLang's own ``ShardedStateLoader.save_model`` writes the loaded model.
        prompts: token ids to continue greedily; none, no generation.
        new_tokens: tokens generated for each prompt.
        recorded_inputs: file for what the prompts give each linear and expert layer (``layer_inputs.py``).
        uninitialized: fills memory that nobody writes (parameters which the checkpoint lacks) with this value, so that
            two loads agree on it; None does not.
        staging: what streaming collects until it is complete; layers are ``sglang_overlay.offline.plan.layers``.
        peak_seconds: how long a whole layer is kept after it is quantized, so that samples do not miss the peak.
        quantizing: ``once`` leaves out the pass that finds the scale, ``none`` captures every write but quantizes
            nothing (``interception.py``).
        without: the CPU reference's optimization that is left out (``ablations.py``).
        threads: number of torch's threads, and so of streaming's; None does not change it.
        device: as ``--device``; ``devices.py`` has the other settings for it.
        graphs: whether CUDA graphs are captured, after loading and before weight updates, as in a server.
        linear: which scales linear layers have; ``tensor`` makes SGLang take its path for devices whose kernels need
            one scale per matrix.
        tokens_of: which weights generate: the ``last`` ones, or ``each``: also the loaded ones before weight updates.
        recorder: ``module:function``, a context manager around the load in each rank; its value is ``recorded``.
        described: ``tensors``, or only their ``sizes`` if fingerprints of a large model would take too long, or the
            ``layouts`` of parameters, from which :mod:`workbench.quality.published` makes checkpoints.
        timeout_seconds: of the job, without the start of processes.
    """

    checkpoint: Path
    streaming: str | None = "1"
    quantization: str | None = "fp8"
    tp_size: int = 1
    ep_size: int = 1
    pp_size: int = 1
    environ: Mapping[str, str] = field(default_factory=dict)
    loader_config: Mapping[str, Any] = field(default_factory=dict)
    server_args: Mapping[str, Any] = field(default_factory=dict)
    updates: tuple[Update | Rebalance | Sleep, ...] = ()
    draft: Path | None = None
    save_sharded_state: Path | None = None
    prompts: tuple[tuple[int, ...], ...] = ()
    new_tokens: int = 8
    recorded_inputs: Path | None = None
    uninitialized: float | None = None
    staging: Literal["units", "layers", "complete_layers"] = "units"
    peak_seconds: float = 0.0
    quantizing: Literal["units", "once", "none"] = "units"
    without: str | None = None
    threads: int | None = None
    device: str = "cpu"
    graphs: Literal["off", "captured"] = "off"
    linear: Literal["stock", "tensor"] = "stock"
    tokens_of: Literal["last", "each"] = "last"
    recorder: str = ""
    described: Literal["tensors", "sizes", "layouts"] = "tensors"
    timeout_seconds: float = 300.0

    @property
    def ranks(self) -> int:
        """Number of processes that load together."""
        return self.tp_size * self.pp_size


@dataclass(frozen=True)
class RankResult:
    """One rank's result of a finished job.

    Args:
        tensors: name -> print; parameters in ``named_parameters`` order, then buffers, then attributes.
        flags: name -> value of each plain attribute of modules and parameters.
        layouts: of all parameters, if the job asks for them.
        parameter_order: names as ``named_parameters`` gives them.
        model_bytes: of all distinct storages the model holds.
        load_seconds: wall time of ``ModelRunner.load_model``.
        load_cpu_seconds: processor time of the process's threads during ``load_model``.
        memory: of the process during ``load_model``, read every 3 ms.
        reserved: the most bytes that the device's allocator has held during ``load_model``; 0 on the CPU.
        torch_threads: number of torch's threads after the model has been loaded.
        recorded: the value of the job's ``recorder``.
        job_seconds: wall time of the whole job in the process.
        updates: results of the job's updates.
        tokens: generated ids, one tuple per prompt.
        tokens_before: the same before weight updates, if ``tokens_of`` is ``each``.
        graph_steps: number of these forward passes that ran as a CUDA graph.
        logits_sha256: of the prefill's logits of all prompts and vocabulary, as float32.
        logits_finite: whether all of these are finite.
        log: warnings of any logger, and all messages of streaming, as ``LEVEL logger: message``.
    """

    rank: int
    tensors: dict[str, TensorPrint]
    flags: dict[str, str]
    parameter_order: tuple[str, ...]
    model_bytes: int
    load_seconds: float
    load_cpu_seconds: float
    job_seconds: float
    memory: MemoryUsage
    tokens: tuple[tuple[int, ...], ...]
    logits_sha256: str
    logits_finite: bool
    log: tuple[str, ...]
    updates: tuple[Any, ...] = ()
    layouts: tuple[WeightLayout, ...] = ()
    reserved: int = 0
    tokens_before: tuple[tuple[int, ...], ...] = ()
    graph_steps: int = 0
    torch_threads: int = 0
    recorded: Any = None


@dataclass(frozen=True)
class RankError:
    """A rank's answer if its job failed."""

    rank: int
    traceback: str


@dataclass(frozen=True)
class Order:
    """A message to a worker: a job, and the port at which its ranks meet."""

    job: LoadJob
    port: int


@contextlib.contextmanager
def changed_environ(changes: Mapping[str, str | None]) -> Iterator[None]:
    """`changes` laid over ``os.environ``; None removes a variable."""
    before = dict(os.environ)
    for name, value in changes.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
