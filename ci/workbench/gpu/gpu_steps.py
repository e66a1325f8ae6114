# SPDX-License-Identifier: Apache-2.0
"""The steps of ``ci/gpu_check``, all in one process: ``python -m workbench.gpu.gpu_steps STEP... --work W --out O``.

They are the loads of ``loads.py`` on another device, and ``gpu_kernels.py``. ``--device cpu`` rehearses them on the CPU
reference platform: steps that it cannot run, and limits that apply to GPUs, are reported as skipped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, Literal

from sglang_overlay.settings import PINNED_RING_VARIABLE, SCHEME_VARIABLE
from workbench.bench import bench
from workbench.bench.bench import BF16, STOCK, STREAMING, Case, Contender, Run
from workbench.gpu import gpu_modules
from workbench.loads import devices
from workbench.loads.checkpoints import CheckpointSpec, Family, build, tensor_plans
from workbench.loads.devices import Accelerator
from workbench.loads.job import LoadJob, Order, RankError
from workbench.loads.loads import PROMPTS, LoadFailed, LoadResult, LoadWorkers, compare, core_binding, free_port
from workbench.loads.updates import Update

Verdict = Literal["passed", "failed", "skipped"]

PEAK_LIMIT = 1.02
"""Highest allowed ratio of a peak on a GPU to the loaded model's bytes."""
LOADER_THREADS = 8
"""Number of threads of DeepSeek's loader."""
TIME_LIMIT = 1.0
"""Highest allowed ratio of load time to stock fp8's on a GPU."""
RING = {PINNED_RING_VARIABLE: "1"}
"""Variables that switch the pinned ring on."""
RING_STREAMING = Contender("streaming, ring", "fp8", "require", environ=RING)
SCHEMES = ("stock", "tensor", "channel", "block", "int8")
EXPERTS = 32
"""Number of experts of the layer whose units are timed."""
BROKEN = 3
"""Exit code: the device no longer responds, so the remaining steps need another process."""

_NEW_SEED = 1
_ZERO_ROWS = slice(3, 40)


@dataclass(frozen=True)
class Finding:
    """One check: what it checked, its verdict, and its figures."""

    what: str
    verdict: Verdict
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


class TimeIsUp(Exception):  # noqa: N818 - reads as what happened
    """There is no time for the next load: it is skipped."""


class ThisProcess(LoadWorkers):
    """Loads models in this process, on one rank, until the time is up."""

    def __init__(self, folder: Path, deadline: float) -> None:
        super().__init__(folder)
        self._deadline = deadline

    def load(self, job: LoadJob) -> LoadResult:
        """Like ``LoadWorkers.load``, but raises ``TimeIsUp`` instead of beginning too late."""
        if time.monotonic() > self._deadline:
            raise TimeIsUp
        from workbench.loads import load_worker

        answer = load_worker.obey(Order(job, free_port()), 0)
        if isinstance(answer, RankError):
            raise LoadFailed(answer.traceback)
        return LoadResult((answer,))


@dataclass(frozen=True)
class Setting:
    """Where and how large: device, folder for checkpoints, GB of the large one, counted rounds, and the loader."""

    device: str
    work: Path
    gigabytes: float
    rounds: int
    loads: LoadWorkers

    @property
    def is_rehearsal(self) -> bool:
        """Whether there is no GPU, and so there are no limits to check and no graphs to capture."""
        return self.device == "cpu"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.work / "checkpoints"

    def large(self, family: Family, share: float = 1.0) -> Case:
        """A checkpoint whose peak and time are measured."""
        size = self.gigabytes * share
        return Case(family, size, bench.sized_spec(family, size), device=self.device)

    def tiny(self, family: Family, seed: int = 0, **overrides: int) -> Path:
        """A checkpoint of a few MB, with its experts' shards in different files."""
        spec = CheckpointSpec(
            family, files=4, assignment="round_robin", seed=seed, overrides=tuple(sorted(overrides.items()))
        )
        return build(spec, self.checkpoints)

    def variant(self, variant: Variant) -> Path:
        """The checkpoint of a variant."""
        plain = self.tiny(variant.family, **variant.overrides)
        return with_zero_rows(plain, variant.zero_rows) if variant.zero_rows else plain


@dataclass(frozen=True)
class Variant:
    """A model to compare with stock, and how it is quantized: ``job`` are fields of its :class:`LoadJob`.

    ``zero_rows`` says in which matrices some rows are all zeros.
    """

    name: str
    family: Family
    job: dict[str, Any] = field(default_factory=dict)
    scales: Literal["channel", "tensor"] | None = None
    overrides: dict[str, int] = field(default_factory=dict)
    zero_rows: tuple[str, ...] = ()


_WIDE: dict[str, Any] = {"overrides": {"intermediate_size": 1280}, "zero_rows": ("gate_proj", "q_proj", "o_proj")}
"""gate and up have 2560 rows together and 1280 each: on an H200, SGLang's row quantizer uses one kernel from 2112 rows
on and another for fewer rows; they differ for rows of zeros.
"""
IDENTITY = (
    Variant("qwen3, scales per channel", "qwen3", scales="channel", **_WIDE),
    Variant("qwen3, one scale a matrix", "qwen3", {"linear": "tensor"}, "tensor", **_WIDE),
    Variant("qwen3_moe", "qwen3_moe"),
    Variant("deepseek_v3", "deepseek_v3"),
)
GRAPHS = tuple(Variant(family, family, {"graphs": "captured"}) for family in ("qwen3", "qwen3_moe", "deepseek_v3"))
WITH_RING = tuple(
    replace(one, name=f"{one.name}, ring", job={**one.job, "environ": RING})
    for one in (*IDENTITY, Variant("deepseek_v3, threads", "deepseek_v3", {"loader_config": {"num_threads": 8}}))
)


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def environment(setting: Setting) -> Iterator[Finding]:
    """Installed versions; whether SGLang's kernels can be loaded with the machine's torch, or compiled there."""
    import torch

    versions = {name: version(name) for name in ("torch", "triton", "sglang", "sglang-streamfp8", "transformers")}
    said = ", ".join(f"{name} {found}" for name, found in versions.items())
    if setting.is_rehearsal:
        yield Finding("versions", "passed", said, versions)
        yield Finding("kernels of sglang-kernel", "skipped", "no GPU")
        return
    free, total = torch.cuda.mem_get_info()
    device = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "free": free, "total": total}
    yield Finding("versions", "passed", f"{said}, {device['device']}", {**versions, **device})
    try:
        importlib.import_module("sgl_kernel")
    except Exception as error:
        about = "made for another torch? ci/gpu_wheels --torch takes the release that is made for this machine's"
        yield Finding("kernels of sglang-kernel", "failed", f"{error} ({about})")
        return
    yield Finding("kernels of sglang-kernel", "passed", version("sglang-kernel"))
    headers = os.environ.get(gpu_modules.SOURCES_VARIABLE)
    for built in gpu_modules.build_all(Path(headers) if headers else None):
        seconds = f"{built.seconds:.1f} s"
        yield Finding(built.name, "failed" if built.error else "passed", built.error or seconds, asdict(built))


def kernels(setting: Setting) -> Iterator[Finding]:
    """Kernels against their emulations, byte for byte; copies to the device; the cost of a unit in each scheme."""
    if setting.is_rehearsal:
        yield Finding("kernels against their emulations", "skipped", "no GPU")
        yield Finding("copies to the device", "skipped", "no GPU")
    else:
        gpu_kernels: Any = importlib.import_module("workbench.gpu.gpu_kernels")
        for what, passed, detail, figures in gpu_kernels.checked(setting.work):
            yield Finding(what, "passed" if passed else "failed", detail, figures)
    for scheme in SCHEMES:
        yield _unit_cost(setting, scheme)


def identity(setting: Setting) -> Iterator[Finding]:
    """Every tensor of a streamed model is bit-identical to stock's, and the model generates the same tokens."""
    for variant in IDENTITY:
        yield _as_stock(setting, variant)


def graphs(setting: Setting) -> Iterator[Finding]:
    """The same, decoding with CUDA graphs."""
    if setting.is_rehearsal:
        yield Finding("decoding with CUDA graphs", "skipped", "no GPU")
        return
    for variant in GRAPHS:
        yield _as_stock(setting, variant)


def memory(setting: Setting) -> Iterator[Finding]:
    """Peak of a load against the loaded model's bytes."""
    for case in (setting.large("qwen3_moe"), setting.large("deepseek_v3", 0.25)):
        begin = time.perf_counter()
        folder = build(case.spec, setting.checkpoints)
        size = sum(file.stat().st_size for file in folder.iterdir())
        yield Finding(f"{case.name} written", "passed", f"{size / 1e9:.2f} GB in {time.perf_counter() - begin:.0f} s")
        for contender in (STOCK, STREAMING):
            (run,) = bench.measure(setting.loads, case, setting.checkpoints, 1, [contender], warm_ups=0).runs
            peak = run.peak / run.final
            beside = _beside_the_model(case.spec)
            detail = f"peak {peak:.3f} x the model's {run.final / 1e9:.2f} GB, {run.reserved / 1e9:.2f} GB reserved"
            detail += f"; {beside / 1e6:.0f} MB do not grow with a model" if beside else ""
            limit = PEAK_LIMIT + beside / run.final if contender is STREAMING else None
            yield _measured(setting, f"{case.name}, peak of {contender.name}", detail, peak, limit, asdict(run))


def _beside_the_model(spec: CheckpointSpec) -> int:
    """Device memory of a DeepSeek load that does not grow with the model, but matters for one of 2 GB. In bytes.

    A unit (an expert's gate and up in bf16 and fp8) in each thread of SGLang's loader, and ``kv_b_proj`` in bf16, which
    SGLang reads before it is quantized, as in stock.
    """
    sizes = {plan.name: plan.nbytes for plan in tensor_plans(spec)}
    deferred = sum(size for name, size in sizes.items() if "kv_b_proj" in name)
    experts = max(size for name, size in sizes.items() if name.endswith("gate_proj.weight") and ".experts." in name)
    return deferred + LOADER_THREADS * 3 * experts if deferred else 0


def load_time(setting: Setting) -> Iterator[Finding]:
    """Load time against stock fp8, in alternating runs, with plain bf16 for comparison."""
    case = setting.large("qwen3_moe")
    contenders = [BF16, STOCK, STREAMING, *([] if setting.is_rehearsal else [RING_STREAMING])]
    runs = bench.measure(setting.loads, case, setting.checkpoints, setting.rounds, contenders).runs
    for contender in contenders:
        limit = TIME_LIMIT if contender is STREAMING else None
        yield _timed(setting, contender, case, runs, limit)


def update(setting: Setting) -> Iterator[Finding]:
    """Weights are replaced in place, so that captured graphs compute with the new ones."""
    families: tuple[Family, ...] = ("qwen3", "qwen3_moe", "deepseek_v3")
    for family in families:
        yield from _updated(setting, family)


def ring(setting: Setting) -> Iterator[Finding]:
    """Identity with the pinned ring, also with loader threads."""
    if setting.is_rehearsal:
        yield Finding("the pinned ring", "skipped", "no GPU, and it is for CUDA alone")
        return
    for variant in WITH_RING:
        yield _as_stock(setting, variant)


STEPS: dict[str, Callable[[Setting], Iterator[Finding]]] = {
    "environment": environment,
    "kernels": kernels,
    "identity": identity,
    "graphs": graphs,
    "memory": memory,
    "time": load_time,
    "update": update,
    "ring": ring,
}


# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def with_zero_rows(checkpoint: Path, matrices: Sequence[str]) -> Path:
    """A copy of a checkpoint, next to it, in which some rows of these matrices are all zeros."""
    from safetensors.torch import load_file, save_file

    target = checkpoint.with_name(f"{checkpoint.name}-zero-rows")
    if target.exists():
        return target
    draft = target.with_suffix(".partial")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(checkpoint, draft)
    for file in draft.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if any(matrix in name for matrix in matrices):
                tensor[_ZERO_ROWS] = 0
        save_file(tensors, file, {"format": "pt"})
    return draft.rename(target)


def _as_stock(setting: Setting, variant: Variant) -> Finding:
    if variant.scales == "channel" and setting.is_rehearsal:
        return Finding(variant.name, "skipped", "SGLang's path for a CPU has one scale a matrix")
    job = LoadJob(setting.variant(variant), device=setting.device, prompts=PROMPTS, **variant.job)
    try:
        stock = setting.loads.load(replace(job, streaming="0"))
        streamed = setting.loads.load(replace(job, streaming="require"))
    except LoadFailed as error:
        return Finding(variant.name, "failed", str(error))
    # Kernels without a fixed summation order give different last digits each time; weights and tokens must agree.
    differences = [line for line in compare(stock, streamed) if not line.endswith("logits of the prompts differ")]
    differences += _unexpected(streamed, variant)
    rank = streamed.ranks[0]
    figures = {"tensors": len(rank.tensors), "graph_steps": rank.graph_steps, "tokens": rank.tokens}
    if differences:
        return Finding(variant.name, "failed", "; ".join(differences[:5]), figures)
    return Finding(variant.name, "passed", f"{len(rank.tensors)} tensors and the tokens are stock's", figures)


def _unexpected(streamed: LoadResult, variant: Variant) -> Iterator[str]:
    """Signs that the comparison did not compare what was intended."""
    rank = streamed.ranks[0]
    scales = {name: one.shape for name, one in rank.tensors.items() if name.endswith("qkv_proj.weight_scale")}
    is_channel = [len(shape) == 2 for shape in scales.values()]
    if variant.scales is not None and not (scales and all(one == (variant.scales == "channel") for one in is_channel)):
        yield f"the scales are not one a {variant.scales}: {scales}"
    if not rank.logits_finite:
        yield "logits are not finite"
    if variant.job.get("environ") == RING and not any("pinned ring" in line for line in streamed.log):
        yield "the pinned ring was not used"
    if variant.job.get("graphs") == "captured" and rank.graph_steps < LoadJob(Path()).new_tokens - 1:
        yield f"only {rank.graph_steps} steps ran as a CUDA graph"


def _unit_cost(setting: Setting, scheme: str) -> Finding:
    """Time and launches per expert of a layer, with Qwen3-30B-A3B's size, or tiny in a rehearsal."""
    size: dict[str, Any] = {} if setting.is_rehearsal else {"size": "bench"}
    spec = CheckpointSpec("qwen3_moe", overrides=(("num_experts", EXPERTS), ("num_hidden_layers", 1)), **size)
    environ = {} if scheme == "stock" else {SCHEME_VARIABLE: json.dumps({"moe": scheme})}
    job = LoadJob(
        build(spec, setting.checkpoints), "require", device=setting.device, environ=environ, described="sizes"
    )
    what = f"an expert, scheme {scheme}"
    try:
        # The first load compiles what the scheme needs; the second is timed; the third is profiled, which is slower.
        if not setting.is_rehearsal:
            setting.loads.load(job)
        seconds = setting.loads.load(job).ranks[0].load_seconds / EXPERTS
        with Accelerator(setting.device).watched() as seen:
            setting.loads.load(job)
    except LoadFailed as error:
        return Finding(what, "failed", str(error))
    figures = {"seconds": seconds, "launches": seen.launches / EXPERTS, "busy_seconds": seen.seconds / EXPERTS}
    busy = f", {figures['launches']:.1f} launches and {figures['busy_seconds'] * 1e6:.0f} us of the GPU"
    return Finding(what, "passed", f"{seconds * 1e6:.0f} us{'' if setting.is_rehearsal else busy}", figures)


def _updated(setting: Setting, family: Family) -> Iterator[Finding]:
    old, new = setting.tiny(family), setting.tiny(family, _NEW_SEED)
    graphs: dict[str, Any] = {} if setting.is_rehearsal else {"graphs": "captured"}
    job = LoadJob(old, "require", device=setting.device, prompts=PROMPTS, tokens_of="each", **graphs)
    try:
        before, after = setting.loads.load(job), setting.loads.load(replace(job, checkpoint=new))
        for source in ("disk", "tensor", "bucket"):
            updated = setting.loads.load(replace(job, updates=(Update(source, new),)))
            yield _judged(f"{family}, from {source}", before, updated, after)
    except LoadFailed as error:
        yield Finding(family, "failed", str(error))


def _judged(what: str, before: LoadResult, updated: LoadResult, after: LoadResult) -> Finding:
    (rank,), (change,) = updated.ranks, updated.ranks[0].updates
    wrong = [] if change.success else [change.message]
    wrong += [f"moved: {', '.join(change.moved[:5])}"] if change.moved else []
    wrong += ["other tokens than before the update"] if rank.tokens_before != before.tokens else []
    wrong += ["the update makes no difference"] if before.tokens == after.tokens else []
    wrong += [line for line in compare(after, updated) if not line.endswith("logits of the prompts differ")]
    figures = {"seconds": change.seconds, "peak": change.memory.peak_above_start, "graph_steps": rank.graph_steps}
    if wrong:
        return Finding(what, "failed", "; ".join(wrong[:5]), figures)
    return Finding(what, "passed", f"{len(rank.tensors)} tensors and the tokens are a fresh load's", figures)


def _timed(setting: Setting, contender: Contender, case: Case, runs: Sequence[Run], limit: float | None) -> Finding:
    found = bench.figures(runs)[contender.name]
    of_stock = bench.ratio(runs, contender.name, STOCK.name, "seconds")
    of_bf16 = bench.ratio(runs, contender.name, BF16.name, "seconds")
    low, high = found.seconds_range
    detail = f"{found.seconds:.2f} s ({low:.2f} to {high:.2f}), {of_stock:.2f} x stock fp8, {of_bf16:.2f} x bf16"
    return _measured(setting, f"{case.name}, time of {contender.name}", detail, of_stock, limit, asdict(found))


def _measured(
    setting: Setting, what: str, detail: str, value: float, limit: float | None, figures: dict[str, Any]
) -> Finding:
    """A figure, judged if there are a limit and a GPU."""
    if limit is None:
        return Finding(what, "passed", detail, figures)
    if setting.is_rehearsal:
        return Finding(what, "skipped", f"{detail}; the limit of {limit} is a GPU's", figures)
    return Finding(what, "passed" if value <= limit else "failed", f"{detail}; limit {limit}", figures)


# ---------------------------------------------------------------------------------------------------------------------
# The process
# ---------------------------------------------------------------------------------------------------------------------


class Findings:
    """Writes each finding immediately: a line of JSON to a file, and a readable line."""

    def __init__(self, out: IO[str], shown: IO[str]) -> None:
        self._out, self._shown = out, shown
        self._begin = time.perf_counter()

    def begun(self, step: str) -> None:
        """Note that a step begins, to know which one the process was at if it dies."""
        print(json.dumps({"step": step, "verdict": "begun"}), file=self._out, flush=True)

    def write(self, step: str, finding: Finding) -> None:
        """One finding of a step."""
        seconds = round(time.perf_counter() - self._begin, 1)
        print(json.dumps({"step": step, "at": seconds, **asdict(finding)}), file=self._out, flush=True)
        line = f"{seconds:6.1f} s  {finding.verdict.upper():8} {step:12} {finding.what:36} {finding.detail}"
        print(line, file=self._shown, flush=True)


def run(steps: Sequence[str], setting: Setting, findings: Findings) -> int:
    """Run all steps one after another, even if some fail."""
    for step in steps:
        findings.begun(step)
        failed = False
        try:
            for finding in STEPS[step](setting):
                findings.write(step, finding)
                failed |= finding.verdict == "failed"
        except TimeIsUp:
            findings.write(step, Finding("the rest of it", "skipped", "the time was up"))
        except Exception:
            findings.write(step, Finding("it raised", "failed", traceback.format_exc()))
            failed = True
        if failed and not Accelerator(setting.device).answers():
            return BROKEN
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run steps and write what they find, as they find it."""
    parser = argparse.ArgumentParser(prog="workbench.gpu.gpu_steps", description=main.__doc__)
    parser.add_argument("steps", nargs="+", choices=STEPS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint-gb", type=float, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True, help="after these no load is begun")
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each finding is added")
    parser.add_argument("--log", type=Path, required=True, help="what SGLang says is added")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.seconds
    shown = os.fdopen(os.dup(1), "w", encoding="utf-8")
    _log_to(options.log)
    os.environ.update({"SGLANG_CPU_OMP_THREADS_BIND": core_binding(1), **devices.environ(options.device)})
    devices.prepare(options.device)
    loads = ThisProcess(options.work, deadline)
    setting = Setting(options.device, options.work, options.checkpoint_gb, options.rounds, loads)
    with options.out.open("a", encoding="utf-8") as out:
        return run(options.steps, setting, Findings(out, shown))


def _log_to(path: Path) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Not sys.exit, which would wait for threads and process groups that SGLang leaves behind.
    os._exit(code)
