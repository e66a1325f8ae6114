"""The process behind :mod:`workbench.loads.loads`: one rank that loads models in real SGLang, one after another.

A job runs like SGLang's own ``sglang.benchmark.one_batch``, after ``load_plugins()`` as in the scheduler:

1. publish the job's server arguments (the last publish wins, so one process can hold many in turn);
2. set up process groups for this job, over gloo on the CPU;
3. build a ``ModelRunner``, watching memory and time of its ``load_model``;
4. make the job's weight updates; fingerprint every tensor of the model; generate when asked;
5. drop the model, what SGLang keeps of it for the process, the groups and the arguments, so that the next job starts
   from scratch.

:mod:`workbench.loads.runtime` has the steps that differ between releases.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import logging
import os
import pkgutil
import time
import traceback
from array import array
from typing import TYPE_CHECKING, Any

# Collections while SGLang is imported take a fifth of the time, and find nothing.
gc.disable()

import sglang.srt.plugins  # noqa: E402

# As in every process SGLang starts: before modules that import names which plugins patch.
sglang.srt.plugins.load_plugins()

import torch  # noqa: E402
from sglang.srt.configs.model_config import ModelConfig  # noqa: E402
from sglang.srt.layers.quantization import fp8  # noqa: E402
from sglang.srt.managers.schedule_batch import Req  # noqa: E402
from sglang.srt.model_executor.model_runner import ModelRunner  # noqa: E402
from sglang.srt.model_loader import loader  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from sglang_overlay.cpu_reference.platform import CpuReferencePlatform  # noqa: E402
from sglang_overlay.hooks import built_in  # noqa: E402
from sglang_overlay.hooks.catalogue import MEASURING, OPTIONS, STREAMING  # noqa: E402
from sglang_overlay.hooks.hook import lifted  # noqa: E402
from sglang_overlay.observe.memory import MemorySampler, MemoryUsage, meter_for  # noqa: E402
from sglang_overlay.offline.plan.layers import whole_layers  # noqa: E402
from sglang_overlay.offline.plan.replacing import replaced  # noqa: E402
from sglang_overlay.settings import MODE_VARIABLE, REPORT_VARIABLE, Mode  # noqa: E402
from workbench.bench.ablations import ABLATIONS  # noqa: E402
from workbench.bench.interception import nothing_quantized, quantized_in_one_pass  # noqa: E402
from workbench.loads import devices, rebalance, runtime, sleeping, update_rule, updates  # noqa: E402
from workbench.loads.checkpoints import torch_threads  # noqa: E402
from workbench.loads.devices import Accelerator  # noqa: E402
from workbench.loads.fingerprints import hash_of, model_bytes, model_flags, model_prints  # noqa: E402
from workbench.loads.job import LoadJob, Order, RankError, RankResult, changed_environ  # noqa: E402
from workbench.loads.layer_inputs import recorded_inputs  # noqa: E402
from workbench.loads.layouts import weight_layouts  # noqa: E402
from workbench.loads.rebalance import Rebalance, RebalanceResult  # noqa: E402
from workbench.loads.sleeping import Sleep, SleepResult  # noqa: E402
from workbench.loads.update_rule import RandomUpdates, RuleResult  # noqa: E402
from workbench.loads.updates import Update, UpdateResult  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from multiprocessing.connection import Connection

# Imports every model, which would otherwise take seconds in the first job of each forked worker.
registry = importlib.import_module("sglang.srt.models.registry")

# Otherwise every collection would walk all objects of SGLang, near a second each time.
gc.collect()
gc.freeze()
gc.enable()

_STREAMING_LOGGERS = ("sglang_overlay", built_in.PACKAGE)
_MEMORY_INTERVAL_MS = 3.0

#: A worker's first message.
READY = "ready"


class MeasuredModelRunner(ModelRunner):  # type: ignore[misc]
    """SGLang's ModelRunner; records memory and time of ``load_model``, and counts passes that ran as a CUDA graph."""

    memory: MemoryUsage
    load_seconds: float
    load_cpu_seconds: float
    reserved: int
    is_draft_worker: bool
    graph_steps = 0

    def load_model(self) -> None:
        accelerator = Accelerator(self.device)
        devices.release_host_memory()
        accelerator.release_memory()
        with MemorySampler(meter_for(self.device), _MEMORY_INTERVAL_MS) as sampler:
            begin, cpu_begin = time.perf_counter(), time.process_time()
            super().load_model()
            accelerator.wait()
            self.load_seconds = time.perf_counter() - begin
            self.load_cpu_seconds = time.process_time() - cpu_begin
        self.memory, self.reserved = sampler.usage, accelerator.reserved_peak

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Counts passes that ran as a CUDA graph."""
        output = super().forward(*args, **kwargs)
        self.graph_steps += bool(getattr(output, "can_run_graph", False))
        return output

    def init_torch_distributed(self) -> Any:
        """For releases up to 0.5.19: a draft runner expects its target's runner, which is not made here, to do this."""
        role, self.is_draft_worker = self.is_draft_worker, False
        try:
            return super().init_torch_distributed()
        finally:
            self.is_draft_worker = role


class Filling(TorchDispatchMode):
    """Fills the results of ``torch.empty`` and similar functions with one value."""

    def __init__(self, value: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._value = value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS and made.is_floating_point():
            made.fill_(self._value)
        return made


_ALLOCATIONS = (
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
)


# ---------------------------------------------------------------------------------------------------------------------
# One job
# ---------------------------------------------------------------------------------------------------------------------


def server_args_of(job: LoadJob) -> ServerArgs:
    fields: dict[str, Any] = {
        "model_path": str(job.checkpoint),
        "device": job.device,
        **devices.server_args(job.device),
        "quantization": job.quantization,
        "tp_size": job.tp_size,
        "ep_size": job.ep_size,
        "pp_size": job.pp_size,
        "model_loader_extra_config": json.dumps(dict(job.loader_config)),
        **(runtime.without_graphs() if job.graphs == "off" else runtime.with_decode_graphs(len(job.prompts))),
        "disable_radix_cache": True,
        "max_total_tokens": 1024,
        "max_running_requests": 8,
        "random_seed": 0,
        "speculative_draft_model_quantization": job.quantization,
        "log_level": "info",
        **job.server_args,
    }
    return ServerArgs(**fields)


def build_runner(job: LoadJob, rank: int, port: int) -> MeasuredModelRunner:
    """Steps 1 to 3 of the module's docstring."""
    server_args = server_args_of(job)
    runtime.publish(server_args, rank)
    model_config = model_config_of(job, server_args)
    role = "target" if job.draft is None else "draft"
    runner: MeasuredModelRunner = runtime.build(MeasuredModelRunner, server_args, model_config, rank, port, role)
    return runner


def model_config_of(job: LoadJob, server_args: ServerArgs) -> ModelConfig:
    if job.draft is None:
        return ModelConfig.from_server_args(server_args)
    return ModelConfig.from_server_args(server_args, model_path=str(job.draft), is_draft_model=True)


def generate(runner: ModelRunner, job: LoadJob) -> dict[str, Any]:
    """Continue the job's prompts greedily, all in one batch, with SGLang's own batch and attention backend."""
    # Clear the state of earlier batches, as SGLang's benchmark does.
    runner.req_to_token_pool.clear()
    runner.token_to_kv_pool_allocator.clear()
    requests = [_request(number, prompt, job.new_tokens) for number, prompt in enumerate(job.prompts)]
    with recorded_inputs(runner.model, job.recorded_inputs):
        next_ids, logits, batch = runtime.one_batch.extend(requests, runner)
    steps = [next_ids.tolist()]
    for _ in range(job.new_tokens - 1):
        next_ids, _ = runtime.one_batch.decode(next_ids, batch, runner)
        steps.append(next_ids.tolist())
    return {
        "tokens": tuple(zip(*steps, strict=True)),
        "logits_sha256": hash_of(logits.float()),
        "logits_finite": bool(torch.isfinite(logits).all()),
    }


def _request(number: int, prompt: tuple[int, ...], new_tokens: int) -> Req:
    request = Req(
        rid=str(number),
        origin_input_text="",
        origin_input_ids=array("q", prompt),
        sampling_params=SamplingParams(temperature=0, max_new_tokens=new_tokens),
    )
    runtime.mark_extended(request)
    return request


def describe(runner: MeasuredModelRunner, job: LoadJob) -> dict[str, Any]:
    """The parts of :class:`workbench.loads.job.RankResult` that belong to the loaded model."""
    model = runner.model
    return {
        "tensors": model_prints(model) if job.described == "tensors" else {},
        "flags": model_flags(model),
        "layouts": tuple(weight_layouts(model)) if job.described == "layouts" else (),
        "parameter_order": tuple(name for name, _ in model.named_parameters()),
        "model_bytes": model_bytes(model),
        "load_seconds": runner.load_seconds,
        "load_cpu_seconds": runner.load_cpu_seconds,
        "memory": runner.memory,
        "reserved": runner.reserved,
        "torch_threads": torch.get_num_threads(),
    }


def one_scale_a_matrix() -> contextlib.AbstractContextManager[None]:
    """Make new linear layers take SGLang's path for devices without its kernel for per-channel scales."""
    return replaced(fp8, "cutlass_fp8_supported", lambda: False)


def _update(
    runner: Any, update: Update | RandomUpdates | Rebalance | Sleep
) -> UpdateResult | RuleResult | RebalanceResult | SleepResult:
    if isinstance(update, Rebalance):
        return rebalance.run(runner, update)
    if isinstance(update, Sleep):
        return sleeping.run(runner, update)
    return update_rule.run(runner, update) if isinstance(update, RandomUpdates) else updates.run(runner, update)


def run_job(job: LoadJob, rank: int, port: int) -> dict[str, Any]:
    """Load, describe, and generate if asked; everything is freed before this returns."""
    runner = None
    torch.manual_seed(0)
    try:
        with contextlib.ExitStack() as stack:
            if job.uninitialized is not None:
                stack.enter_context(Filling(job.uninitialized))
            if job.staging != "units":
                stack.enter_context(whole_layers(job.peak_seconds, when_complete=job.staging == "complete_layers"))
            if job.quantizing == "none":
                stack.enter_context(nothing_quantized())
            if job.quantizing == "once":
                stack.enter_context(quantized_in_one_pass())
            if job.without is not None:
                stack.enter_context(ABLATIONS[job.without]())
            if job.threads is not None:
                stack.enter_context(torch_threads(job.threads))
                # It would set them again.
                stack.enter_context(replaced(CpuReferencePlatform, "init_backend", lambda _platform: None))
            if job.described == "layouts":
                # Dummy weights need not have values, and the stand-in GPUs have no generator of random ones.
                stack.enter_context(replaced(loader, "initialize_dummy_weights", lambda *_, **__: None))
                if job.server_args.get("load_format") == "dummy" and hasattr(loader, "post_load_weights"):
                    # What models make of the values; some drafts know only from their load that they are one.
                    stack.enter_context(replaced(loader, "post_load_weights", lambda _model: None))
            if job.linear == "tensor":
                stack.enter_context(one_scale_a_matrix())
            recorded = stack.enter_context(pkgutil.resolve_name(job.recorder)()) if job.recorder else None
            runner = build_runner(job, rank, port)
        return {"recorded": recorded, **finish(runner, job)}
    finally:
        del runner
        runtime.take_down()
        devices.release_host_memory()
        Accelerator(job.device).release_memory()


def finish(runner: MeasuredModelRunner, job: LoadJob) -> dict[str, Any]:
    """Step 4 of the module's docstring, with a first generation before the updates if the job asks for that."""
    outputs: dict[str, Any] = {"tokens": (), "logits_sha256": "", "logits_finite": True}
    first: dict[str, Any] = outputs
    is_ready = job.graphs == "captured" or job.tokens_of == "each"
    if is_ready:
        runtime.get_ready_to_generate(runner)
    if job.tokens_of == "each":
        first = generate(runner, job)
    updated = tuple(_update(runner, update) for update in job.updates)
    described = describe(runner, job)
    if job.save_sharded_state is not None:
        loader.ShardedStateLoader.save_model(runner.model, str(job.save_sharded_state))
    if job.prompts:
        if not is_ready:
            runtime.get_ready_to_generate(runner)
        outputs = generate(runner, job)
    kept = {"updates": updated, "tokens_before": first["tokens"], "graph_steps": runner.graph_steps}
    return {**described, **outputs, **kept}


# ---------------------------------------------------------------------------------------------------------------------
# The process
# ---------------------------------------------------------------------------------------------------------------------


class LogCollector(logging.Handler):
    """Keeps warnings of any logger, and all messages of streaming, by the overlay or by SGLang itself."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or record.name.startswith(_STREAMING_LOGGERS):
            self.lines.append(f"{record.levelname} {record.name}: {record.getMessage()}")


@contextlib.contextmanager
def collected_log() -> Iterator[list[str]]:
    collector = LogCollector()
    logging.getLogger().addHandler(collector)
    try:
        yield collector.lines
    finally:
        logging.getLogger().removeHandler(collector)


@contextlib.contextmanager
def job_environ(changes: Mapping[str, str | None]) -> Iterator[list[str]]:
    """Apply `changes` to the environment, and yield what is logged meanwhile.

    Hooks that a process with this environment would not have are taken off: stock has none.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(changed_environ(changes))
        if os.environ.get(MODE_VARIABLE) == Mode.OFF.value:
            measuring = MEASURING if os.environ.get(REPORT_VARIABLE) else ()
            stack.enter_context(lifted(hook for hook in (*STREAMING, *OPTIONS) if hook not in measuring))
        yield stack.enter_context(collected_log())


def obey(order: Order, rank: int) -> RankResult | RankError:
    """Run one order; a failure is returned, not raised."""
    begin = time.perf_counter()
    with job_environ({MODE_VARIABLE: order.job.streaming, **order.job.environ}) as log:
        try:
            fields = run_job(order.job, rank, order.port)
        except Exception:
            return RankError(rank, traceback.format_exc())
    return RankResult(rank=rank, job_seconds=time.perf_counter() - begin, log=tuple(log), **fields)


def serve(rank: int, orders: Connection, log_path: str) -> None:
    """Answer orders until the other side closes or a job fails, which may leave SGLang's globals in any state."""
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    if models := os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE"):
        # As registry.py does for the variables of the process that imported it, here maybe the fork server.
        registry.ModelRegistry.register(models, overwrite=True)
    orders.send(READY)
    with contextlib.suppress(EOFError):
        while True:
            answer = obey(orders.recv(), rank)
            orders.send(answer)
            if isinstance(answer, RankError):
                print(answer.traceback, flush=True)
                return
