"""Real loads in real SGLang: describe a job, get back what every rank ended up with, compare two of them.

    with LoadWorkers(folder) as workers:
        stock = workers.load(LoadJob(path, streaming="0", quantization="fp8", prompts=PROMPTS))
        stream = workers.load(LoadJob(path, streaming="1", quantization="fp8", prompts=PROMPTS))
    assert compare(stock, stream) == []

Importing SGLang takes far longer than loading a tiny model, so :class:`LoadWorkers` keeps one process a rank alive for
each TP size and sends it one job after another (:mod:`workbench.load_worker` is the process). A failed job costs its
processes; the next job starts new ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

#: Token ids every tiny vocabulary has; lengths differ so that a batch is ragged.
PROMPTS: tuple[tuple[int, ...], ...] = ((3, 50, 97, 120, 7), (200, 201, 30, 31, 32, 33, 34, 8, 9), (259, 4, 300))

_POLL_SECONDS = 0.02
_GRACE_SECONDS = 5.0


class LoadFailed(RuntimeError):  # noqa: N818 - reads as what happened
    """A job did not come to its end; the message has the failing rank's traceback and where its log is."""


@dataclass(frozen=True)
class LoadJob:
    """One load of one checkpoint.

    Args:
        checkpoint: folder of the checkpoint.
        streaming: value of ``SGLANG_STREAMFP8`` during the job: ``"0"``, ``"1"``, ``"require"``; None leaves it unset.
        quantization: ``"fp8"`` or None, as ``--quantization``.
        tp_size, ep_size: as the options of the server.
        environ: further environment variables during the job, e.g. ``{"SGLANG_SORT_WEIGHT_FILES": "1"}``. Only those
            which SGLang reads at run time work here; for the others see ``LoadWorkers(environ=...)``.
        loader_config: ``--model-loader-extra-config``, e.g. ``{"enable_multithread_load": False}``.
        server_args: further fields of SGLang's ``ServerArgs``.
        prompts: token ids to continue greedily; none, no generation.
        new_tokens: tokens generated for each prompt.
        device: as ``--device``.
        timeout_seconds: of the job, processes' start not counted.
    """

    checkpoint: Path
    streaming: str | None = "1"
    quantization: str | None = "fp8"
    tp_size: int = 1
    ep_size: int = 1
    environ: Mapping[str, str] = field(default_factory=dict)
    loader_config: Mapping[str, Any] = field(default_factory=dict)
    server_args: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[tuple[int, ...], ...] = ()
    new_tokens: int = 8
    device: str = "cpu"
    timeout_seconds: float = 300.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "checkpoint": str(self.checkpoint)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LoadJob:
        prompts = tuple(tuple(prompt) for prompt in content["prompts"])
        return cls(**{**content, "checkpoint": Path(content["checkpoint"]), "prompts": prompts})


@dataclass(frozen=True)
class TensorPrint:
    """What two loads must agree on about one tensor.

    Args:
        kind: ``parameter``, ``buffer``, or ``attribute`` for a tensor found in a module's ``__dict__``.
        sha256: of the values in row-major order, so it does not depend on strides; those are compared beside it.
        class_name: of the Python object, e.g. ``Parameter`` or ``ModelWeightParameter``. Not compared.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str
    sha256: str
    class_name: str


@dataclass(frozen=True)
class LoadMemory:
    """Memory of one process around the load, in bytes. See ``sglang_overlay.observe.memory.MemoryUsage``."""

    metric: str
    start: int
    peak_above_start: int
    end_above_start: int
    samples: tuple[tuple[float, int], ...]


@dataclass(frozen=True)
class RankResult:
    """One rank's side of a finished job.

    Args:
        tensors: name -> print; parameters in ``named_parameters`` order, then buffers, then attributes.
        parameter_order: names as ``named_parameters`` gives them.
        model_bytes: of all distinct storages the model holds.
        load_seconds: wall time of ``ModelRunner.load_model``.
        job_seconds: wall time of the whole job in the process.
        tokens: generated ids, one tuple a prompt.
        logits_sha256: of the prefill's logits of all prompts and vocabulary, as float32.
        logits_finite: whether all of these are finite.
        log: warnings of any logger, and everything of the overlay's, as ``LEVEL logger: message``.
    """

    rank: int
    tensors: dict[str, TensorPrint]
    parameter_order: tuple[str, ...]
    model_bytes: int
    load_seconds: float
    job_seconds: float
    memory: LoadMemory
    tokens: tuple[tuple[int, ...], ...]
    logits_sha256: str
    logits_finite: bool
    log: tuple[str, ...]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RankResult:
        tensors = {
            name: TensorPrint(**{**found, "shape": tuple(found["shape"]), "stride": tuple(found["stride"])})
            for name, found in content["tensors"].items()
        }
        memory = content["memory"]
        samples = tuple((second, value) for second, value in memory["samples"])
        return cls(
            **{
                **content,
                "tensors": tensors,
                "parameter_order": tuple(content["parameter_order"]),
                "memory": LoadMemory(**{**memory, "samples": samples}),
                "tokens": tuple(tuple(ids) for ids in content["tokens"]),
                "log": tuple(content["log"]),
            }
        )


@dataclass(frozen=True)
class LoadResult:
    """A finished job, one entry a rank in rank order."""

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
    """Everything in which two loads differ: a line each, empty when the models are bit-identical.

    Names, ``named_parameters`` order, kind, dtype, shape, stride, device and bytes of every tensor; tokens and logits
    where both generated.
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
    return lines + _compare_outputs(first, second)


def _compare_tensors(name: str, first: TensorPrint, second: TensorPrint) -> list[str]:
    lines = []
    for aspect in ("kind", "dtype", "shape", "stride", "device"):
        one, other = getattr(first, aspect), getattr(second, aspect)
        if one != other:
            lines.append(f"{name}: {aspect} {one} != {other}")
    if not lines and first.sha256 != second.sha256:
        lines.append(f"{name}: bytes differ ({first.dtype} {list(first.shape)})")
    return lines


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
    """A TCP port that is free now on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _core_binding(ranks: int) -> str:
    """``SGLANG_CPU_OMP_THREADS_BIND``: this process's cores dealt out to `ranks`, e.g. ``0|1``."""
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[rank::ranks] or [cores[rank % len(cores)]] for rank in range(ranks)]
    return "|".join(",".join(map(str, share)) for share in shares)


class _RankProcess:
    """One worker process: jobs go in as lines of JSON, results come back as files."""

    def __init__(self, rank: int, folder: Path, environ: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.rank = rank
        self.log_path = folder / f"rank{rank}.log"
        self._folder = folder
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "workbench.load_worker", str(rank)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environ),
                start_new_session=True,
            )

    def send(self, number: int, job: LoadJob, port: int) -> None:
        assert self._process.stdin is not None
        order = {"job": job.to_json(), "port": port, "result": str(self.result_path(number))}
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()

    def result_path(self, number: int) -> Path:
        return self._folder / f"job{number}-rank{self.rank}.json"

    def answer(self, number: int) -> dict[str, Any] | None:
        """The worker's answer; None while it is working; an error when it died without one."""
        ended = self._process.poll()
        path = self.result_path(number)
        if path.exists():
            answer: dict[str, Any] = json.loads(path.read_text())
            return answer
        if ended is None:
            return None
        return {"error": f"the process ended with status {ended}\n{self._tail()}"}

    def _tail(self) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-40:])

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        # The worker leads its own session, so this reaches what it started and nothing else.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class LoadWorkers:
    """Worker processes, one a rank and a TP size, started when first needed and used for many jobs.

    Args:
        folder: for logs and results; made if missing.
        environ: variables laid over this process's environment for all workers, from their start on.
    """

    def __init__(self, folder: Path, environ: Mapping[str, str] | None = None) -> None:
        self._folder = folder
        self._environ = dict(environ or {})
        self._groups: dict[int, list[_RankProcess]] = {}
        self._started = 0
        self._jobs = 0

    def __enter__(self) -> LoadWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self, job: LoadJob) -> LoadResult:
        """Run `job` in the workers of its TP size.

        Raises:
            LoadFailed: the job failed, or took longer than ``job.timeout_seconds``.
        """
        group = self._group(job.tp_size)
        self._jobs += 1
        port = free_port()
        for process in group:
            process.send(self._jobs, job, port)
        try:
            return LoadResult(tuple(self._collect(group, job)))
        except BaseException:
            self._discard(job.tp_size)
            raise

    def load_fresh(self, job: LoadJob) -> LoadResult:
        """Run `job` in processes of its own.

        For memory: memory which an earlier job's allocator kept makes the next job's peak look smaller than it is.
        """
        with LoadWorkers(self._folder / f"fresh{time.monotonic_ns()}", self._environ) as workers:
            return workers.load(job)

    def load_all(self, jobs: Sequence[LoadJob]) -> list[LoadResult]:
        """``load`` for each, in order."""
        return [self.load(job) for job in jobs]

    def close(self) -> None:
        """Let all workers end."""
        for group in self._groups.values():
            for process in group:
                process.close()
        self._groups.clear()

    def _group(self, ranks: int) -> list[_RankProcess]:
        if ranks not in self._groups:
            self._started += 1
            folder = self._folder / f"tp{ranks}-{self._started}"
            environ = self._environ_of(ranks)
            self._groups[ranks] = [_RankProcess(rank, folder, environ) for rank in range(ranks)]
        return self._groups[ranks]

    def _environ_of(self, ranks: int) -> dict[str, str]:
        package_root = str(Path(__file__).resolve().parents[1])
        path = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            "SGLANG_CPU_OMP_THREADS_BIND": _core_binding(ranks),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            **self._environ,
        }

    def _collect(self, group: list[_RankProcess], job: LoadJob) -> list[RankResult]:
        answers = self._wait_for(group, self._jobs, job.timeout_seconds)
        return [RankResult.from_json(answer) for answer in answers]

    def _wait_for(self, group: list[_RankProcess], number: int, seconds: float) -> list[dict[str, Any]]:
        """All ranks' answers; a rank which failed is not waited for, as its peers may wait for it for ever."""
        deadline = time.monotonic() + seconds
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(group):
            for process in group:
                answer = process.answer(number) if process.rank not in answers else None
                if answer is not None:
                    _raise_error(process, answer)
                    answers[process.rank] = answer
            if time.monotonic() > deadline:
                logs = ", ".join(str(process.log_path) for process in group)
                raise LoadFailed(f"no answer within {seconds:.0f} s; logs: {logs}")
            time.sleep(_POLL_SECONDS)
        return [answers[process.rank] for process in group]

    def _discard(self, ranks: int) -> None:
        for process in self._groups.pop(ranks, ()):
            process.kill()


def _raise_error(process: _RankProcess, answer: Mapping[str, Any]) -> None:
    if "error" in answer:
        raise LoadFailed(f"rank {process.rank} failed, its log is {process.log_path}:\n{answer['error']}")
