# SPDX-License-Identifier: Apache-2.0
"""Peak memory and load time of a checkpoint, loaded in several ways in alternating runs.

Every run is ``ModelRunner.load_model`` in real SGLang, in a process that has loaded a model before, so that no run
includes imports and first-use costs. Times on a shared machine drift: quote the ratios, which compare neighbouring
runs, and look at processor seconds beside them.

A case is one checkpoint read in one order. ``measure`` makes its checkpoint and runs the contenders in turn;
``size_cases`` and ``scaling_cases`` are the series that ``ci/bench`` runs.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from workbench.bench.ablations import ABLATIONS
from workbench.loads.checkpoints import CheckpointSpec, Family, build, checkpoint_path, tensor_plans
from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadResult, LoadWorkers
from workbench.loads.updates import Update

GIGABYTE = 10**9

FileOrder = Literal["sorted", "staggered", "shuffled"]
ORDERS: tuple[FileOrder, ...] = get_args(FileOrder)
SIZES = (0.5, 1, 2, 4, 8)
"""GB of bf16 weights, doubling."""
BENCH_FAMILIES: tuple[Family, ...] = ("qwen3", "qwen3_moe", "deepseek_v3")


@dataclass(frozen=True)
class Contender:
    """One way to load a checkpoint; ``environ`` has the environment variables of its loads.

    ``presharded`` is the folder of a dump (``--load-format presharded``) that is read, or written if it is not there.
    """

    name: str
    quantization: str | None
    streaming: str
    staging: Literal["units", "layers", "complete_layers"] = "units"
    quantizing: Literal["units", "once", "none"] = "units"
    without: str | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    presharded: Path | None = None


BF16 = Contender("stock bf16", None, "0")
STOCK = Contender("stock fp8", "fp8", "0")
LAYERS = Contender("whole layers", "fp8", "require", staging="layers")
COMPLETE_LAYERS = Contender("complete layers", "fp8", "require", staging="complete_layers")
STREAMING = Contender("streaming", "fp8", "require")
INTERCEPTING = Contender("not quantizing", "fp8", "require", quantizing="none")
"""Streaming that only captures and stages every write: the cost of interception."""
ONE_PASS = Contender("one pass", "fp8", "require", quantizing="once")
"""Streaming that reads and writes each weight once, with a scale of 1: a lower bound for a load."""
CONTENDERS = (BF16, STOCK, LAYERS, COMPLETE_LAYERS, STREAMING)
ABLATED = tuple(Contender(f"without {part}", "fp8", "require", without=part) for part in ABLATIONS)
"""Streaming without one of the CPU reference's optimizations."""


@dataclass(frozen=True)
class Case:
    """One checkpoint, read in one order.

    Args:
        name: distinguishes it from the others of its series.
        value: its place on the axis of its series: GB, layers, experts, threads.
        spec: the checkpoint.
        order: of its files. With ``staggered`` (``SGLANG_SORT_WEIGHT_FILES=1``) each rank begins with a different file.
        tp_size: number of ranks.
        threads: number of threads of each rank; None for all.
        device: the device that models are loaded to.
    """

    name: str
    value: float
    spec: CheckpointSpec
    order: FileOrder = "sorted"
    tp_size: int = 1
    threads: int | None = None
    device: str = "cpu"

    @property
    def environ(self) -> Mapping[str, str]:
        """Environment variables of its loads."""
        return {"SGLANG_SORT_WEIGHT_FILES": "1"} if self.order == "staggered" else {}


@dataclass(frozen=True)
class Run:
    """One load: wall and processor seconds, and bytes above start (``peak``) and of the loaded model (``final``).

    Seconds are the slowest rank's; processor seconds and bytes are summed over ranks. ``reserved`` is the most memory
    that the device's allocator has reserved; 0 on the CPU.
    """

    contender: str
    seconds: float
    cpu_seconds: float
    peak: int
    final: int
    reserved: int = 0


@dataclass(frozen=True)
class CaseResult:
    """The counted runs of a case, in order, and the bytes and number of its checkpoint's weights."""

    case: Case
    checkpoint_bytes: int
    checkpoint_tensors: int
    runs: tuple[Run, ...]


def size_cases(
    families: Iterable[Family], gigabytes: Iterable[float], orders: Iterable[FileOrder], tp_size: int = 1
) -> list[Case]:
    """Every family in every order at every size. ``staggered`` cases have at least two ranks."""
    return [
        Case(
            f"{family} {size:g} GB {order}",
            size,
            sized_spec(family, size, order),
            order,
            max(tp_size, 2) if order == "staggered" else tp_size,
        )
        for family in families
        for order in orders
        for size in gigabytes
    ]


def scaling_cases(threads: Sequence[int]) -> dict[str, list[Case]]:
    """Cases by what they vary: size (layers with many experts), layers with few experts, experts, threads."""

    def spec(layers: int, experts: int) -> CheckpointSpec:
        chosen = (("num_hidden_layers", layers), ("num_experts", experts))
        return CheckpointSpec("qwen3_moe", size="bench", files=4, overrides=chosen)

    return {
        "size": [replace(case, name=f"{case.value:g} GB") for case in size_cases(["qwen3_moe"], SIZES, ["sorted"])],
        "layers": [Case(f"{n} layers", n, spec(n, 32)) for n in (1, 2, 4, 8)],
        "experts": [Case(f"{n} experts", n, spec(2, n)) for n in (16, 32, 64, 128)],
        "threads": [Case(f"{n} threads", n, spec(4, 32), threads=n) for n in threads],
    }


def overhead_case() -> Case:
    """Thousands of 4 kB tensors, which take no time to read or quantize: this shows the cost per tensor."""
    chosen = (
        ("num_hidden_layers", 8),
        ("num_experts", 512),
        ("hidden_size", 64),
        ("moe_intermediate_size", 32),
    )
    return Case("small tensors", 1, CheckpointSpec("qwen3_moe", files=4, overrides=chosen))


def sized_spec(family: Family, gigabytes: float, order: FileOrder = "sorted") -> CheckpointSpec:
    """The checkpoint of a family with the number of layers that comes nearest to ``gigabytes``."""
    dense = 1 if family.startswith("deepseek") else 0  # A first layer without experts.
    one, two = (weight_bytes(_layered(family, dense + n)) for n in (1, 2))
    layers = dense + max(1, round((gigabytes * GIGABYTE - 2 * one + two) / (two - one)))
    files = max(4, round(gigabytes * 2))
    return _layered(family, layers, files, "shuffled" if order == "shuffled" else "ordered")


def _layered(
    family: Family, layers: int, files: int = 1, file_names: Literal["ordered", "shuffled"] = "ordered"
) -> CheckpointSpec:
    return CheckpointSpec(
        family, size="bench", files=files, file_names=file_names, overrides=(("num_hidden_layers", layers),)
    )


def weight_bytes(spec: CheckpointSpec) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(plan.nbytes for plan in tensor_plans(spec))


def measure(
    workers: LoadWorkers,
    case: Case,
    folder: Path,
    rounds: int,
    contenders: Sequence[Contender] = CONTENDERS,
    done: Callable[[Run], None] = lambda _: None,
    warm_ups: int = 1,
) -> CaseResult:
    """Run each contender ``warm_ups`` times without counting, then ``rounds`` times all in turn.

    ``folder`` is where the checkpoint is, or will be written.
    """
    checkpoint = build(case.spec, folder)
    runs = []
    for number in range(warm_ups + rounds):
        for contender in contenders:
            run = _run(contender, workers.load(job_of(case, contender, checkpoint)))
            if number >= warm_ups:
                runs.append(run)
            done(run)
    return CaseResult(case, weight_bytes(case.spec), len(tensor_plans(case.spec)), tuple(runs))


def remove(case: Case, folder: Path) -> None:
    """Delete the checkpoint of ``case``, if it is there."""
    shutil.rmtree(checkpoint_path(case.spec, folder), ignore_errors=True)


def job_of(case: Case, contender: Contender, checkpoint: Path, updates: tuple[Update, ...] = ()) -> LoadJob:
    """One run of a contender, with weight updates after the load."""
    return LoadJob(
        checkpoint,
        streaming=contender.streaming,
        quantization=contender.quantization,
        staging=contender.staging,
        quantizing=contender.quantizing,
        without=contender.without,
        tp_size=case.tp_size,
        threads=case.threads,
        environ={**case.environ, **contender.environ},
        loader_config={"presharded_path": str(contender.presharded)} if contender.presharded else {},
        server_args={"load_format": "presharded"} if contender.presharded else {},
        device=case.device,
        updates=updates,
        described="sizes",
        timeout_seconds=900,
    )


def _run(contender: Contender, result: LoadResult) -> Run:
    return Run(
        contender=contender.name,
        seconds=max(rank.load_seconds for rank in result.ranks),
        cpu_seconds=sum(rank.load_cpu_seconds for rank in result.ranks),
        peak=sum(rank.memory.peak_above_start for rank in result.ranks),
        final=sum(rank.model_bytes for rank in result.ranks),
        reserved=sum(rank.reserved for rank in result.ranks),
    )


@dataclass(frozen=True)
class Figures:
    """Medians of one contender."""

    contender: str
    seconds: float
    cpu_seconds: float
    peak: float
    final: float
    seconds_range: tuple[float, float] = field(default=(0.0, 0.0))

    @property
    def peak_of_final(self) -> float:
        """Ratio of the peak above start to the loaded model's bytes."""
        return self.peak / self.final


def figures(runs: Sequence[Run]) -> dict[str, Figures]:
    """Medians by contender, in the order they ran."""
    return {name: _figures(name, _of(runs, name)) for name in dict.fromkeys(run.contender for run in runs)}


def _figures(name: str, runs: Sequence[Run]) -> Figures:
    seconds = [run.seconds for run in runs]
    return Figures(
        contender=name,
        seconds=statistics.median(seconds),
        cpu_seconds=statistics.median(run.cpu_seconds for run in runs),
        peak=statistics.median(run.peak for run in runs),
        final=statistics.median(run.final for run in runs),
        seconds_range=(min(seconds), max(seconds)),
    )


def ratio(runs: Sequence[Run], one: str, other: str, measured: str) -> float:
    """Median over the rounds of ``one / other``, comparing runs of the same round."""
    pairs = zip(_of(runs, one), _of(runs, other), strict=True)
    return float(statistics.median(getattr(a, measured) / getattr(b, measured) for a, b in pairs))


def added_seconds_a_tensor(result: CaseResult, one: str, other: str) -> float:
    """Processor seconds per tensor that ``one`` takes more than ``other``: median over the rounds."""
    pairs = zip(_of(result.runs, one), _of(result.runs, other), strict=True)
    return statistics.median(a.cpu_seconds - b.cpu_seconds for a, b in pairs) / result.checkpoint_tensors


def _of(runs: Sequence[Run], contender: str) -> list[Run]:
    return [run for run in runs if run.contender == contender]
