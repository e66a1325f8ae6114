# SPDX-License-Identifier: Apache-2.0
"""A real scheduler of a target and a draft in a process of its own, whose weights a test updates, and where it says
what goes wrong.

    with SchedulerProcess(log) as scheduler:
        scheduler.start(target, draft)
        answer = scheduler.ask("disk", checkpoint, faults=[Fault("package.module:Class.method", OSError("no room"))])

``ask`` sends the scheduler SGLang's own request, ``call`` calls the target's weight updater. The process imports SGLang
itself: SGLang builds trees of drafts on GPUs only, and a scheduler with a draft starts on the CPU, up to its first
prompt, where the platform says that it can, and with Triton's kernels in the interpreter.
``SchedulerRanks`` are several of them that share a model.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import multiprocessing
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from workbench.loads.job import LoadJob, changed_environ
from workbench.loads.loads import free_port

from sglang_overlay.observe.weights_report import STATE
from sglang_overlay.settings import MODE_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection
    from types import TracebackType

    from workbench.loads.fingerprints import TensorPrint

_SECONDS = 300.0

What = Literal["begin", "tensor", "distributed", "ipc", "disk", "end", "join", "info", "check", "sleep", "wake"]

GROUP = "trainer"
"""Of a trainer that broadcasts; ``join`` makes one that has no other member."""


@dataclass(frozen=True)
class Fault:
    """An error that a function raises instead of what it does.

    Args:
        target: ``module:name``, of a function or a method.
        error: that is raised.
        after: calls that go well before that.
        times: calls that fail; those after them go well again.
    """

    target: str
    error: BaseException
    after: int = 0
    times: int = sys.maxsize


@dataclass(frozen=True)
class Held:
    """What one model holds: its tensors, the path it was read from, and whether an update of it is open."""

    tensors: dict[str, TensorPrint]
    path: str
    is_open: bool


@dataclass(frozen=True)
class Answer:
    """What became of a request or a call.

    Args:
        success, message: as SGLang answers; of a call that returns nothing, none.
        raised: in place of an answer.
        held: by target and draft afterwards.
    """

    success: bool
    message: str
    raised: BaseException | None
    held: tuple[Held, ...]


@dataclass(frozen=True)
class _Order:
    """What the process is to do: start a scheduler of two models, or an update."""

    kind: Literal["start", "ask", "call"]
    rank: int
    what: What = "begin"
    folders: tuple[Path, ...] = ()
    sent: bytes = b""
    faults: tuple[Fault, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)


class SchedulerProcess:
    """The process, killed when it is left.

    Args:
        log: file for what it prints.
        rank: of those that share the model.
        environ: variables laid over this process's environment there.
    """

    def __init__(self, log: Path, rank: int = 0, **environ: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._rank = rank
        self._log = log
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(log)), daemon=True)
        with changed_environ({MODE_VARIABLE: "1", "TRITON_INTERPRET": "1", **environ}):
            self._process.start()
        theirs.close()

    def __enter__(self) -> SchedulerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()

    def start(self, target: Path, draft: Path, **server_args: Any) -> Answer:
        """A scheduler of these models, in place of the one before."""
        return self._send(_Order("start", self._rank, folders=(target, draft), fields=server_args))

    def ask(
        self, what: What, *checkpoint: Path, names: str = "", faults: Sequence[Fault] = (), **fields: Any
    ) -> Answer:
        """Send the scheduler a request.

        Args:
            what: it asks for.
            checkpoint: where the new weights are.
            names: only tensors in whose name this regular expression is found; not from disk.
            faults: what goes wrong meanwhile.
            fields: further ones of the request.
        """
        # Here, as in a trainer: with SGLang's patch of torch a process that updates weights serializes none on the CPU.
        sent = _serialized(checkpoint[0], names) if what == "tensor" else b""
        return self._send(_Order("ask", self._rank, what, checkpoint, sent, tuple(faults), fields))

    def call(self, what: What, *checkpoint: Path, faults: Sequence[Fault] = (), **arguments: Any) -> Answer:
        """Call the target's weight updater, past the scheduler; as of ``ask``, with further arguments of the method."""
        return self._send(_Order("call", self._rank, what, checkpoint, faults=tuple(faults), fields=arguments))

    def printed(self) -> str:
        """What the process has printed and logged so far."""
        return self._log.read_text(errors="replace")

    def _send(self, order: _Order) -> Answer:
        self._pipe.send(order)
        if not self._pipe.poll(_SECONDS):
            raise RuntimeError(f"the scheduler hangs: {self._log}")
        try:
            answer: Answer = self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the scheduler's process has ended:\n{self.printed()[-4000:]}") from None
        return answer


class SchedulerRanks:
    """Two ranks that share a target and a draft.

    Args:
        folder: for what they print.
        environ: as of ``SchedulerProcess``.

    Attributes:
        ranks: by number.
    """

    def __init__(self, folder: Path, **environ: str) -> None:
        self.ranks = [SchedulerProcess(folder / f"rank-{rank}.txt", rank, **environ) for rank in range(2)]
        self._threads = ThreadPoolExecutor(len(self.ranks))

    def __enter__(self) -> SchedulerRanks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rank in self.ranks:
            rank.__exit__(kind, error, trace)
        self._threads.shutdown()

    def start(self, target: Path, draft: Path) -> list[Answer]:
        """Schedulers of these models."""
        fields = {"tp_size": len(self.ranks), "nccl_port": free_port()}
        return self._together(lambda rank, _: rank.start(target, draft, **fields))

    def ask(self, what: What, *checkpoint: Path, faults: Sequence[Fault] = (), on: int = 1) -> list[Answer]:
        """Send all of them a request; ``faults`` go wrong on the rank ``on`` alone."""
        return self._together(lambda rank, number: rank.ask(what, *checkpoint, faults=faults if number == on else ()))

    def call(self, what: What, faults: Sequence[Fault] = (), on: int = 1, **arguments: Any) -> list[Answer]:
        """Call the weight updaters of all of them."""
        return self._together(lambda rank, number: rank.call(what, faults=faults if number == on else (), **arguments))

    def _together(self, do: Callable[[SchedulerProcess, int], Answer]) -> list[Answer]:
        return list(self._threads.map(do, self.ranks, range(len(self.ranks))))


# ---------------------------------------------------------------------------------------------------------------------
# The process
# ---------------------------------------------------------------------------------------------------------------------


def _serve(orders: Connection, log: str) -> None:
    opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(opened, 1)
    os.dup2(opened, 2)
    logging.basicConfig(level=logging.INFO)
    sys.modules["checkpoint_engine"] = ModuleType("checkpoint_engine")
    sys.modules["checkpoint_engine.worker"] = engine = ModuleType("checkpoint_engine.worker")
    engine.update_weights_from_ipc = _weights_of_a_folder  # type: ignore[attr-defined]
    scheduler = None
    with contextlib.suppress(EOFError):
        while True:
            order: _Order = orders.recv()
            success, message, raised = True, "", None
            try:
                if order.kind == "start":
                    scheduler = _started(order)
                else:
                    success, message = _answer(scheduler, order)
            except BaseException as error:
                # The process's log has it, where the test that asked for it wants to know more.
                traceback.print_exc()
                if order.kind == "start":
                    raise
                success, raised = False, error.with_traceback(None)
            orders.send(Answer(success, message, raised, tuple(map(_held, _runners(scheduler)))))


def _weights_of_a_folder(
    _context: Any, folder: str, device_id: Any, run: Callable[[Any], Any], post_hook: Callable[[], None]
) -> None:
    """In place of the checkpoint engine, a package that is not installed: gives what it would receive to SGLang."""
    run(list(_tensors(Path(folder))))
    post_hook()


def _started(order: _Order) -> Any:
    import torch
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.server_args import PortArgs
    from workbench.loads import load_worker, runtime

    from sglang_overlay.cpu_reference.platform import CpuReferencePlatform

    CpuReferencePlatform.supports_speculative_algorithm = lambda *_: True
    # A draft waits for the GPU where it takes its target's embeddings.
    torch.cuda.synchronize = lambda *_: None
    target, draft = order.folders
    fields = {
        "attention_backend": "triton",
        "max_total_tokens": 512,
        "speculative_algorithm": "STANDALONE",
        "speculative_draft_model_path": str(draft),
        "speculative_num_steps": 1,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 2,
        **order.fields,
    }
    runtime.take_down()
    server_args = load_worker.server_args_of(LoadJob(target, server_args=fields))
    runtime.publish(server_args, rank=order.rank)
    # Until 0.5.19 a scheduler is told its place.
    ranks = dict.fromkeys(("moe_ep_rank", "pp_rank", "attn_cp_rank", "moe_dp_rank"), 0)
    ranks |= {"gpu_id": order.rank, "tp_rank": order.rank}
    ports = PortArgs.init_new(server_args)
    return runtime.told(Scheduler, server_args=server_args, port_args=ports, dp_rank=None, **ranks)


def _runners(scheduler: Any) -> list[Any]:
    manager = scheduler.weight_updater
    if hasattr(manager, "_select_runners"):
        return [runner for _, runner in manager._select_runners()]
    module = sys.modules[type(manager).__module__]
    return [manager.tp_worker.model_runner, module._get_draft_model_runner(manager.draft_worker)]


def _held(runner: Any) -> Held:
    from workbench.loads.fingerprints import model_prints

    from sglang_overlay.update.model import updatable

    known = updatable(runner.model)
    is_open = known is not None and known.open is not None
    return Held(model_prints(runner.model), runner.model_config.model_path, is_open)


def _answer(scheduler: Any, order: _Order) -> tuple[bool, str]:
    with contextlib.ExitStack() as stack:
        for fault in order.faults:
            stack.enter_context(_failing(fault))
        if order.what == "info":
            state = scheduler.get_internal_state(_state_request())
            return True, json.dumps(state.internal_state, default=repr)
        if order.kind == "ask":
            answer = scheduler._request_dispatcher(_request(order))
            # SGLang answers to sleep and wake by nothing.
            return getattr(answer, "success", True), getattr(answer, "message", "")
        runner = _runners(scheduler)[0]
        # Until 0.5.15 the runner updates its weights itself.
        method, arguments = _call(getattr(runner, "weight_updater", runner), order)
        returned = method(*arguments, **order.fields)
        return (True, "") if returned is None else returned


@contextlib.contextmanager
def _failing(fault: Fault) -> Iterator[None]:
    module, _, path = fault.target.partition(":")
    parent, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(f"{module}:{parent}" if parent else module)
    before = inspect.getattr_static(owner, name)
    function, left = getattr(before, "__func__", before), [fault.after]

    def fail(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if -fault.times <= left[0] < 0:
            raise fault.error
        return function(*args, **kwargs)

    setattr(owner, name, staticmethod(fail) if isinstance(before, staticmethod) else fail)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _request(order: _Order) -> Any:
    from sglang.srt.managers import io_struct

    if order.what == "begin":
        return io_struct.BeginWeightUpdateReqInput(**order.fields)
    if order.what == "end":
        return io_struct.EndWeightUpdateReqInput()
    if order.what == "check":
        return io_struct.CheckWeightsReqInput(action=STATE)
    if order.what == "sleep":
        return io_struct.ReleaseMemoryOccupationReqInput(tags=["weights"])
    if order.what == "wake":
        return io_struct.ResumeMemoryOccupationReqInput(tags=["weights"])
    (folder,) = order.folders
    if order.what == "disk":
        return io_struct.UpdateWeightFromDiskReqInput(model_path=str(folder), load_format="auto")
    if order.what == "distributed":
        return io_struct.UpdateWeightsFromDistributedReqInput(group_name=GROUP, **_described(folder))
    if order.what == "ipc":
        return _ipc(folder)
    sent = [order.sent] * (order.rank + 1)
    return io_struct.UpdateWeightsFromTensorReqInput(serialized_named_tensors=sent, **order.fields)


def _state_request() -> Any:
    from sglang.srt.managers.io_struct import GetInternalStateReq

    return GetInternalStateReq()


def _call(updater: Any, order: _Order) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A method of the updater's, and what it is given."""
    if order.what in ("begin", "end"):
        return getattr(updater, f"{order.what}_weight_update"), ()
    if order.what == "join":
        return updater.init_weights_update_group, ("127.0.0.1", free_port(), -order.rank, 1, GROUP, "gloo")
    (folder,) = order.folders
    if order.what == "disk":
        return updater.update_weights_from_disk, (str(folder),)
    if order.what == "ipc":
        return updater.update_weights_from_ipc, (_ipc(folder),)
    if order.what == "distributed":
        return updater.load_weights_from_distributed, (_tensors(folder),)
    return updater.update_weights_from_tensor, (_tensors(folder),)


def _described(folder: Path) -> dict[str, Any]:
    names, tensors = zip(*_tensors(folder), strict=True)
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    return {"names": list(names), "dtypes": dtypes, "shapes": [list(tensor.shape) for tensor in tensors]}


def _ipc(folder: Path) -> Any:
    from sglang.srt.managers.io_struct import UpdateWeightsFromIPCReqInput
    from sglang.srt.platforms import current_platform

    return UpdateWeightsFromIPCReqInput(zmq_handles={f"GPU-{current_platform.get_device_uuid()}": str(folder)})


def _serialized(folder: Path, names: str) -> bytes:
    from sglang.srt.utils import MultiprocessingSerializer

    tensors = [(name, tensor) for name, tensor in _tensors(folder) if re.search(names, name)]
    serialized: bytes = MultiprocessingSerializer.serialize(tensors)
    return serialized


def _tensors(folder: Path) -> list[tuple[str, Any]]:
    from workbench.loads.updates import tensors_of

    return list(tensors_of(folder))
