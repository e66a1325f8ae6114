# SPDX-License-Identifier: Apache-2.0
"""The steps of ``ci/gpu_check``, each of them a process: ``python -m workbench.gpu_steps STEP --work ... --out ...``.

They are the loads of :mod:`workbench.loads` with another device. ``--device cpu`` rehearses them on the CPU reference
platform: what that cannot do, and limits that hold for a GPU, are then reported as skipped.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from sglang_overlay.settings import PINNED_RING_VARIABLE
from workbench import bench
from workbench.bench import BF16, STOCK, STREAMING, Case, CaseResult, Contender
from workbench.checkpoints import CheckpointSpec, Family, build
from workbench.loads import PROMPTS, LoadFailed, LoadJob, LoadResult, LoadWorkers, compare
from workbench.updates import Update

Verdict = Literal["passed", "failed", "skipped"]

PEAK_LIMIT = 1.02
"""Highest allowed peak on a GPU, of the loaded model's bytes (issue 4)."""
TIME_LIMIT = 1.0
"""Longest allowed load on a GPU, of plain bf16's."""
RING = {PINNED_RING_VARIABLE: "1"}
"""Variables that switch the pinned ring on."""
RING_STREAMING = Contender("streaming, ring", "fp8", "require", environ=RING)

_NEW_SEED = 1


@dataclass(frozen=True)
class Finding:
    """One thing that was checked, how that went, and the figures found."""

    what: str
    verdict: Verdict
    detail: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Where and how large: device, folder for checkpoints and logs, GB of the large checkpoint, counted rounds."""

    device: str
    work: Path
    gigabytes: float
    rounds: int

    @property
    def is_rehearsal(self) -> bool:
        """Whether there is no GPU, and so no limit to hold and no graph to capture."""
        return self.device == "cpu"

    @property
    def large(self) -> Case:
        """The checkpoint whose peak and time are measured."""
        return Case("large", self.gigabytes, bench.sized_spec("qwen3_moe", self.gigabytes), device=self.device)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.work / "checkpoints"

    def tiny(self, family: Family, seed: int = 0) -> Path:
        """A checkpoint of a few MB, its experts' shards in different files."""
        return build(CheckpointSpec(family, files=4, assignment="round_robin", seed=seed), self.checkpoints)

    def workers(self) -> LoadWorkers:
        """Processes for loads to the device."""
        return LoadWorkers.on(self.device, self.work / "logs")


@dataclass(frozen=True)
class Variant:
    """A model to compare with stock, and how it is quantized: ``job`` are fields of its :class:`LoadJob`."""

    name: str
    family: Family
    job: dict[str, Any] = field(default_factory=dict)
    scales: Literal["channel", "tensor"] | None = None


IDENTITY = (
    Variant("qwen3, scales per channel", "qwen3", scales="channel"),
    Variant("qwen3, one scale a matrix", "qwen3", {"linear": "tensor"}, "tensor"),
    Variant("qwen3_moe", "qwen3_moe"),
    Variant("qwen3_moe, one scale a matrix", "qwen3_moe", {"linear": "tensor"}, "tensor"),
    Variant("qwen2_moe", "qwen2_moe"),
    Variant("deepseek_v2", "deepseek_v2"),
    Variant("deepseek_v3", "deepseek_v3"),
)
GRAPHS = tuple(Variant(family, family, {"graphs": "captured"}) for family in ("qwen3", "qwen3_moe", "deepseek_v3"))
WITH_RING = tuple(Variant(f"{one.name}, ring", one.family, {**one.job, "environ": RING}) for one in IDENTITY)


# ---------------------------------------------------------------------------------------------------------------------
# Steps
# ---------------------------------------------------------------------------------------------------------------------


def environment(setting: Setting) -> Iterator[Finding]:
    """What is installed, and whether SGLang's kernels can be loaded beside the machine's torch."""
    import torch

    versions = {name: version(name) for name in ("torch", "triton", "sglang", "sglang-streamfp8", "transformers")}
    if setting.is_rehearsal:
        yield Finding("versions", "passed", figures=versions)
        yield Finding("kernels of sglang-kernel", "skipped", "no GPU")
        return
    free, total = torch.cuda.mem_get_info()
    device = {"device": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "free": free, "total": total}
    yield Finding("versions", "passed", figures={**versions, **device})
    try:
        importlib.import_module("sgl_kernel")
    except Exception as error:
        about = "made for another torch? ci/gpu_wheels --torch takes the release that is made for this machine's"
        yield Finding("kernels of sglang-kernel", "failed", f"{error} ({about})")
    else:
        yield Finding("kernels of sglang-kernel", "passed", version("sglang-kernel"))


def identity(setting: Setting) -> Iterator[Finding]:
    """Every tensor of a streamed model is stock's to the bit, and it generates the same tokens."""
    with setting.workers() as workers:
        for variant in IDENTITY:
            yield _as_stock(workers, setting, variant)


def graphs(setting: Setting) -> Iterator[Finding]:
    """The same, decoding with CUDA graphs."""
    if setting.is_rehearsal:
        yield Finding("decoding with CUDA graphs", "skipped", "no GPU")
        return
    with setting.workers() as workers:
        for variant in GRAPHS:
            yield _as_stock(workers, setting, variant)


def update(setting: Setting) -> Iterator[Finding]:
    """Weights are replaced where they are, so that captured graphs compute with the new ones."""
    families: tuple[Family, ...] = ("qwen3", "qwen3_moe", "deepseek_v3")
    with setting.workers() as workers:
        for family in families:
            yield from _updated(workers, setting, family)


def checkpoint(setting: Setting) -> Iterator[Finding]:
    """Write the large checkpoint, for the steps after this one."""
    begin = time.perf_counter()
    folder = build(setting.large.spec, setting.checkpoints)
    size = sum(file.stat().st_size for file in folder.iterdir())
    yield Finding("random qwen3_moe", "passed", f"{size / 1e9:.2f} GB in {time.perf_counter() - begin:.0f} s")


def memory(setting: Setting) -> Iterator[Finding]:
    """Peak of a load in a process of its own, against the loaded model's bytes."""
    build(setting.large.spec, setting.checkpoints)
    for contender in (STOCK, STREAMING):
        with setting.workers() as workers:
            (run,) = bench.measure(workers, setting.large, setting.checkpoints, 1, [contender], warm_ups=0).runs
        peak = run.peak / run.final
        detail = f"peak {peak:.3f} x the model's {run.final / 1e9:.2f} GB, {run.reserved / 1e9:.2f} GB reserved"
        limit = PEAK_LIMIT if contender is STREAMING else None
        yield _measured(setting, f"peak of {contender.name}", detail, peak, limit, asdict(run))


def load_time(setting: Setting) -> Iterator[Finding]:
    """Load time against stock fp8 and plain bf16, in alternating runs."""
    yield from _times(setting, (BF16, STOCK, STREAMING), STREAMING)


def ring(setting: Setting) -> Iterator[Finding]:
    """Identity and load time with the pinned ring on."""
    if setting.is_rehearsal:
        yield Finding("the pinned ring", "skipped", "no GPU, and it is for CUDA alone")
        return
    with setting.workers() as workers:
        for variant in WITH_RING:
            yield _as_stock(workers, setting, variant)
    yield from _times(setting, (BF16, STREAMING, RING_STREAMING), RING_STREAMING)


STEPS: dict[str, Callable[[Setting], Iterator[Finding]]] = {
    "environment": environment,
    "identity": identity,
    "graphs": graphs,
    "update": update,
    "checkpoint": checkpoint,
    "memory": memory,
    "time": load_time,
    "ring": ring,
}


# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def _as_stock(workers: LoadWorkers, setting: Setting, variant: Variant) -> Finding:
    if variant.scales == "channel" and setting.is_rehearsal:
        return Finding(variant.name, "skipped", "SGLang's path for a CPU has one scale a matrix")
    job = LoadJob(setting.tiny(variant.family), device=setting.device, prompts=PROMPTS, **variant.job)
    try:
        stock = workers.load(replace(job, streaming="0"))
        streamed = workers.load(replace(job, streaming="require"))
    except LoadFailed as error:
        return Finding(variant.name, "failed", str(error))
    # Kernels that add in no fixed order give other last digits each time; weights and tokens must agree.
    differences = [line for line in compare(stock, streamed) if not line.endswith("logits of the prompts differ")]
    differences += _unexpected(streamed, variant)
    rank = streamed.ranks[0]
    figures = {"tensors": len(rank.tensors), "graph_steps": rank.graph_steps, "tokens": rank.tokens}
    if differences:
        return Finding(variant.name, "failed", "; ".join(differences[:5]), figures)
    return Finding(variant.name, "passed", f"{len(rank.tensors)} tensors and the tokens are stock's", figures)


def _unexpected(streamed: LoadResult, variant: Variant) -> Iterator[str]:
    """What shows that the comparison was not of what it was meant to be of."""
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


def _updated(workers: LoadWorkers, setting: Setting, family: Family) -> Iterator[Finding]:
    old, new = setting.tiny(family), setting.tiny(family, _NEW_SEED)
    graphs: dict[str, Any] = {} if setting.is_rehearsal else {"graphs": "captured"}
    job = LoadJob(old, "require", device=setting.device, prompts=PROMPTS, tokens_of="each", **graphs)
    try:
        before, after = workers.load(job), workers.load(replace(job, checkpoint=new))
        for source in ("disk", "tensor", "bucket"):
            updated = workers.load(replace(job, updates=(Update(source, new),)))
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


def _times(setting: Setting, contenders: Sequence[Contender], judged: Contender) -> Iterator[Finding]:
    with setting.workers() as workers:
        result = bench.measure(workers, setting.large, setting.checkpoints, setting.rounds, contenders)
    for contender in contenders:
        found = bench.figures(result.runs)[contender.name]
        of_bf16 = bench.ratio(result.runs, contender.name, BF16.name, "seconds")
        low, high = found.seconds_range
        detail = f"{found.seconds:.2f} s ({low:.2f} to {high:.2f}), {of_bf16:.2f} x bf16, {_rate(found, result)}"
        limit = TIME_LIMIT if contender is judged else None
        yield _measured(setting, f"time of {contender.name}", detail, of_bf16, limit, asdict(found))


def _rate(found: bench.Figures, result: CaseResult) -> str:
    return f"{result.checkpoint_bytes / found.seconds / 1e9:.2f} GB/s of checkpoint"


def _measured(
    setting: Setting, what: str, detail: str, value: float, limit: float | None, figures: dict[str, Any]
) -> Finding:
    """A figure, judged where there is a limit and a GPU."""
    if limit is None:
        return Finding(what, "passed", detail, figures)
    if setting.is_rehearsal:
        return Finding(what, "skipped", f"{detail}; the limit of {limit} is a GPU's", figures)
    return Finding(what, "passed" if value <= limit else "failed", f"{detail}; limit {limit}", figures)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one step and write what it found, as it finds it."""
    parser = argparse.ArgumentParser(prog="workbench.gpu_steps", description=main.__doc__)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint-gb", type=float, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a line of JSON for each finding")
    options = parser.parse_args(arguments)
    setting = Setting(options.device, options.work, options.checkpoint_gb, options.rounds)
    with options.out.open("w", encoding="utf-8") as out:
        for finding in STEPS[options.step](setting):
            print(json.dumps(asdict(finding)), file=out, flush=True)
            print(f"{finding.verdict}: {finding.what}: {finding.detail}", flush=True)
    return 0


if __name__ == "__main__":
    main()
