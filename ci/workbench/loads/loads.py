"""Real loads in real SGLang: describe a job, get back what every rank ended up with, compare two of them.

    with LoadWorkers(folder) as workers:
        stock = workers.load(LoadJob(path, streaming="0", quantization="fp8", prompts=PROMPTS))
        stream = workers.load(LoadJob(path, streaming="1", quantization="fp8", prompts=PROMPTS))
    assert compare(stock, stream) == []

Importing SGLang takes far longer than loading a tiny model, so it is done once: Python's fork server imports
``load_worker.py``, and every worker process is forked from there. For each TP size, :class:`LoadWorkers` keeps one
process per rank alive and sends it one job after another. A failed job ends its processes; the next starts new ones.

Processes are started by ``multiprocessing``, so a script that uses this needs ``if __name__ == "__main__":``.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pkgutil
import random
import socket
import time
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.loads import devices
from workbench.loads.job import LoadJob, Order, RankError, RankResult, StartMethod, changed_environ

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from multiprocessing.context import ForkServerContext, SpawnContext
    from types import TracebackType

    from workbench.loads.fingerprints import TensorPrint

#: Token ids every tiny vocabulary has; lengths differ so that a batch is ragged.
PROMPTS: tuple[tuple[int, ...], ...] = ((3, 50, 97, 120, 7), (200, 201, 30, 31, 32, 33, 34, 8, 9), (259, 4, 300))

STORED_AS_FP8 = ("qkv_proj_with_rope_is_fp8", "shared_experts_is_fp8", "shared_experts_weight_block_size")
"""Flags of ``deepseek_v2.py`` that say, when a layer is created, whether its checkpoint is fp8: False under online
quantization, also stock's. They select kernels for AMX, and optional ones (``SGLANG_OPT_MOE_QUANT_ONCE``, MegaMoE)."""

_WORKER_MODULE = "workbench.loads.load_worker"
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_START_SECONDS = 300.0
_GRACE_SECONDS = 5.0


class LoadFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """A job failed; the message has the failing rank's traceback and the path of its log."""


@dataclass(frozen=True)
class LoadResult:
    """The results of a finished job, in rank order."""

    ranks: tuple[RankResult, ...]

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        """Rank 0's tokens."""
        return self.ranks[0].tokens

    @property
    def log(self) -> tuple[str, ...]:
        """The log lines of all ranks, rank 0 first."""
        return tuple(line for rank in self.ranks for line in rank.log)


# ---------------------------------------------------------------------------------------------------------------------
# Comparing
# ---------------------------------------------------------------------------------------------------------------------


def compare(first: LoadResult, second: LoadResult) -> list[str]:
    """All differences of two loads, one per line; empty if the models are bit-identical.

    Compares names, ``named_parameters`` order, kind, class, dtype, shape, stride, device and bytes of every tensor;
    plain attributes of modules and parameters; tokens and logits if both generated.
    """
    if len(first.ranks) != len(second.ranks):
        return [f"ranks: {len(first.ranks)} != {len(second.ranks)}"]
    pairs = zip(first.ranks, second.ranks, strict=True)
    return [f"rank {a.rank}: {line}" for a, b in pairs for line in _compare_ranks(a, b)]


def _compare_ranks(first: RankResult, second: RankResult) -> list[str]:
    lines = [f"{name}: only in the first" for name in first.tensors if name not in second.tensors]
    lines += [f"{name}: only in the second" for name in second.tensors if name not in first.tensors]
    if not lines and first.parameter_order != second.parameter_order:
        lines.append("named_parameters come in another order")
    for name, print_ in first.tensors.items():
        if name in second.tensors:
            lines += _compare_tensors(name, print_, second.tensors[name])
    lines += _compare_flags(first.flags, second.flags)
    return lines + _compare_outputs(first, second)


def _compare_tensors(name: str, first: TensorPrint, second: TensorPrint) -> list[str]:
    lines = []
    for aspect in ("kind", "class_name", "requires_grad", "dtype", "shape", "stride", "device"):
        one, other = getattr(first, aspect), getattr(second, aspect)
        if one != other:
            lines.append(f"{name}: {aspect} {one} != {other}")
    if not lines and first.sha256 != second.sha256:
        pairs = enumerate(zip(first.slices, second.slices, strict=True))
        where = [str(number) for number, (one, other) in pairs if one != other]
        at = f", at {', '.join(where[:8])}{' ...' if len(where) > 8 else ''}" if where else ""
        lines.append(f"{name}: bytes differ ({first.dtype} {list(first.shape)}{at})")
    return lines


def _compare_flags(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    names = sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
    return [f"{name}: {first.get(name, 'absent')} != {second.get(name, 'absent')}" for name in names]


def _compare_outputs(first: RankResult, second: RankResult) -> list[str]:
    if not (first.tokens and second.tokens):
        return []
    lines = []
    if first.tokens != second.tokens:
        lines.append(f"tokens {first.tokens} != {second.tokens}")
    if first.logits_sha256 != second.logits_sha256:
        lines.append("logits of the prompts differ")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A TCP port that is free now on all interfaces. SGLang derives others from it by adding up to 30000."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            # torch's store listens on all of them; a port that is taken on another one is not free for it.
            probe.bind(("", port))
            return port


def core_binding(ranks: int) -> str:
    """``SGLANG_CPU_OMP_THREADS_BIND``: this process's cores divided among `ranks`, e.g. ``0|1``."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank::ranks] or [cores[rank % len(cores)]] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)


def process_context(start_method: StartMethod) -> ForkServerContext | SpawnContext:
    """The context that starts processes; with ``forkserver`` they have SGLang and ``load_worker.py`` imported."""
    if start_method == "spawn":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_WORKER_MODULE])
    # Python 3.11's fork server ignores the sys.path it is given, and silently fails to find the module.
    with changed_environ({"PYTHONPATH": os.pathsep.join([_PACKAGE_ROOT, os.environ.get("PYTHONPATH", "")])}):
        forkserver.ensure_running()
    return context


def _serve(
    rank: int, orders: connection.Connection, log_path: str, environ: dict[str, str], prepare: str | None
) -> None:
    """The main function of a worker process: set `environ`, then import SGLang unless the fork server has done so."""
    os.environ.clear()
    os.environ.update(environ)
    if prepare is not None:
        pkgutil.resolve_name(prepare)()
    from workbench.loads.load_worker import serve

    serve(rank, orders, log_path)


class _RankProcess:
    """One worker process: an :class:`Order` in, a :class:`RankResult` or :class:`RankError` out."""

    def __init__(
        self,
        rank: int,
        folder: Path,
        environ: Mapping[str, str],
        start_method: StartMethod | ForkServerContext,
        prepare: str | None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rank = rank
        self.log_path = folder / f"rank{rank}.log"
        context = process_context(start_method) if isinstance(start_method, str) else start_method
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve,
            args=(rank, theirs, str(self.log_path), dict(environ), prepare),
            name=f"load-rank{rank}",
            daemon=True,
        )
        with changed_environ(dict(environ)):
            self.process.start()
        theirs.close()

    def send(self, order: Order) -> None:
        # If the process is dead, `receive` reports that with its log.
        with contextlib.suppress(BrokenPipeError):
            self.pipe.send(order)

    def receive(self) -> RankResult | RankError:
        """The answer, once :attr:`pipe` is ready; an error if the process died without one."""
        try:
            answer: RankResult | RankError = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(_GRACE_SECONDS)
            return RankError(self.rank, f"the process ended with exit code {self.process.exitcode}\n{self._tail()}")
        return answer

    def _tail(self) -> str:
        if not self.log_path.exists():
            return "(it wrote no log)"
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-40:])

    def close(self) -> None:
        self.pipe.close()
        self.process.join(_GRACE_SECONDS)
        self.kill()

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


class LoadWorkers:
    """Worker processes, one per rank and TP size, started when first needed and reused for many jobs.

    Args:
        folder: for logs; created if missing.
        environ: variables added to this process's environment in all workers.
        start_method: ``forkserver``, or ``spawn`` for workers that import SGLang themselves: needed where a variable
            in `environ` is read when SGLang is imported or plugins are loaded (``SGLANG_PLUGINS``), and with CUDA,
            which does not survive a fork; or a context whose fork server has not imported SGLang.
        prepare: ``module:function`` that workers call before they import SGLang.
    """

    def __init__(
        self,
        folder: Path,
        environ: Mapping[str, str] | None = None,
        start_method: StartMethod | ForkServerContext = "forkserver",
        prepare: str | None = None,
    ) -> None:
        self._folder = folder
        self._environ = dict(environ or {})
        self._start_method = start_method
        self._prepare = prepare
        self._groups: dict[int, list[_RankProcess]] = {}
        self._started = 0

    @classmethod
    def on(cls, device: str, folder: Path) -> LoadWorkers:
        """Workers for jobs of this ``device``."""
        return cls(folder, devices.environ(device), devices.start_method(device))

    def __enter__(self) -> LoadWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, job: LoadJob) -> LoadResult:
        """Run `job` in one worker per rank.

        Raises:
            LoadFailed: the job failed, or took longer than ``job.timeout_seconds``.
        """
        group = self._group(job.ranks)
        order = Order(job, free_port())
        for process in group:
            process.send(order)
        try:
            return LoadResult(tuple(_collect(group, job.timeout_seconds)))
        except BaseException:
            self._discard(job.ranks)
            raise

    def load_fresh(self, job: LoadJob) -> LoadResult:
        """Run `job` in new processes.

        For measuring memory: memory that an earlier job's allocator kept makes the next job's peak look smaller.
        """
        self._started += 1
        with LoadWorkers(
            self._folder / f"fresh-{self._started}", self._environ, self._start_method, self._prepare
        ) as workers:
            return workers.load(job)

    def load_all(self, jobs: Sequence[LoadJob]) -> list[LoadResult]:
        """``load`` for each, in order."""
        return [self.load(job) for job in jobs]

    def close(self) -> None:
        """End all workers."""
        for group in self._groups.values():
            for process in group:
                process.close()
        self._groups.clear()

    def _group(self, ranks: int) -> list[_RankProcess]:
        if ranks not in self._groups:
            self._started += 1
            folder = self._folder / f"tp{ranks}-{self._started}"
            environ = {"SGLANG_CPU_OMP_THREADS_BIND": core_binding(ranks), **os.environ, **self._environ}
            self._groups[ranks] = [
                _RankProcess(rank, folder, environ, self._start_method, self._prepare) for rank in range(ranks)
            ]
            _wait_until_ready(self._groups[ranks])
        return self._groups[ranks]

    def _discard(self, ranks: int) -> None:
        for process in self._groups.pop(ranks, ()):
            process.kill()


def _wait_until_ready(group: list[_RankProcess]) -> None:
    """Wait until each process has imported SGLang, so that this does not count as a job's time."""
    for process in group:
        if not process.pipe.poll(_START_SECONDS):
            raise LoadFailed(f"rank {process.rank} did not start within {_START_SECONDS:.0f} s: {process.log_path}")
        answer = process.receive()
        if isinstance(answer, RankError):
            raise LoadFailed(f"rank {process.rank} did not start:\n{answer.traceback}")


def _collect(group: list[_RankProcess], seconds: float) -> list[RankResult]:
    """All ranks' results in rank order. A failed rank ends the wait, since the others may wait for it forever."""
    deadline = time.monotonic() + seconds
    waiting = {process.pipe: process for process in group}
    results: dict[int, RankResult] = {}
    while waiting:
        ready = connection.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            logs = ", ".join(str(process.log_path) for process in group)
            raise LoadFailed(f"no answer within {seconds:.0f} s; logs: {logs}")
        for pipe in ready:
            process = waiting.pop(pipe)  # type: ignore[call-overload]
            results[process.rank] = _result_of(process)
    return [results[process.rank] for process in group]


def _result_of(process: _RankProcess) -> RankResult:
    answer = process.receive()
    if isinstance(answer, RankError):
        raise LoadFailed(f"rank {process.rank} failed, its log is {process.log_path}:\n{answer.traceback}")
    return answer
