"""Planned GPU work of loads and updates besides memory: for which models and schemes, and the page that shows it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sglang_overlay.offline.plan.job import DeviceWork, Job, Layout
from sglang_overlay.offline.plan.simulate import Loaded, loaded
from sglang_overlay.schemes.choice import STOCK, SchemeChoice
from sglang_overlay.update.weight_update import WeightUpdate
from workbench.bench import page_tables
from workbench.bench.plans import CONFIGS

if TYPE_CHECKING:
    from sglang_overlay.offline.plan.process import Planners

PAGE = CONFIGS.parents[3] / "docs" / "costs.md"
MODELS = {"DeepSeek-V3": 8, "Qwen3-235B-A22B": 4, "Qwen3-30B-A3B": 1}
"""Models and the TP size of each."""
SCHEMES = {
    STOCK: SchemeChoice(),
    "block": SchemeChoice(linear="block", moe="block"),
    "channel": SchemeChoice(linear="channel", moe="channel"),
    "int8": SchemeChoice(moe="int8"),
}


TASK = f"{__name__}:cost"
"""What ``Planners`` has to do."""


@dataclass(frozen=True)
class Cost:
    """One load of a model, by stock or by streaming with a scheme, and a full update from disk, which stock has not."""

    model: str
    tp: int
    loading: str
    load: DeviceWork
    update: DeviceWork | None


def cost(job: Job) -> tuple[DeviceWork, DeviceWork | None]:
    """The work of a load without memory, and of a full update from disk after it."""
    with loaded(job) as found:
        return found.summary.work, None if job.mode == "stock" else _update(found)


def _update(found: Loaded) -> DeviceWork:
    """The work of a full update, as ``update_hooks.load_weights_and_postprocess`` runs one where there is one rank."""
    from sglang.srt.model_loader.loader import DefaultModelLoader

    before = replace(found.work)
    for layer in found.load.updatable.values():
        layer.seal()
    with closing(WeightUpdate(found.load.updatable.values(), wanted=found.load.checkpoint.wanted)) as update:
        with torch.no_grad(), update.loading(found.model):
            weights = found.weights(lambda _name, tensor: update.sources.offer(tensor))
            DefaultModelLoader.load_weights_and_postprocess(found.model, weights, found.device)
        update.finish(found.model)
    return DeviceWork(*(after - was for after, was in zip(astuple(found.work), astuple(before), strict=True)))


def planned(planners: Planners, models: Sequence[str], configs: Path = CONFIGS) -> Iterator[Cost]:
    """Plan each load, in parallel on all workers."""
    wanted = [(model, loading, job) for model in models for loading, job in _jobs(configs / f"{model}.json", model)]
    costs: Iterator[Any] = planners.run([job for _, _, job in wanted])
    for (model, loading, job), (load, update) in zip(wanted, costs, strict=True):
        yield Cost(model, job.layout.tp, loading, load, update)


def _jobs(config: Path, model: str) -> Iterator[tuple[str, Job]]:
    job = Job(config, Layout(tp=MODELS.get(model, 1)))
    yield "stock", replace(job, mode="stock")
    for name, schemes in SCHEMES.items():
        yield "streaming" if name == STOCK else f"streaming, {name}", replace(job, schemes=schemes)


_COLUMNS = (
    "model",
    "TP:",
    "loading",
    *(heading for kind in ("", "update: ") for heading in (f"{kind}launches:", "copies to the GPU:", "waits:")),
)


def _numbers(work: DeviceWork | None) -> list[str]:
    return [""] * 3 if work is None else [f"{number:,}" for number in astuple(work)]


def to_markdown(release: str, costs: Sequence[Cost]) -> str:
    """The page."""
    rows = [
        [
            cost.model,
            str(cost.tp),
            cost.loading,
            *_numbers(cost.load),
            *_numbers(cost.update),
        ]
        for cost in costs
    ]
    return f"""# What a load and an update cost on a GPU

Beside memory a load costs launches (each takes the host some microseconds, however little there is to do), copies to
the GPU, and waits for its answers. These are of one rank, as the [planner](planner.md) counts them in SGLang's own
model code and loaders on a device without memory, for SGLang {release}. No GPU was used; on a stand-in GPU the tests
hold the same rules for loads of real checkpoints (`tests/standin/test_costs.py`). `ci/costs` writes this page.

{page_tables.markdown(_COLUMNS, rows)}
A *launch* is an operation of torch's or a kernel of SGLang's that runs on the GPU, copies within it included; views and
allocations are none. *Streaming* without a scheme makes what stock makes.

- An expert takes at most 30 launches in any scheme, and a unit of stock's at most 14 beside upstream's own
  (`tests/schemes/test_launches.py`); a projection that lies in two tensors of the checkpoint takes a few more.
- Each checkpoint tensor is copied to the GPU once. What waits for the rest of its unit waits in host memory: in a
  mapped file it takes none. Under `channel` and `int8` at TP above 1, a tensor that is split along columns brings a
  second, small copy: the largest magnitude of each whole row.
- Stock awaits six answers in each MLA layer (DeepSeek), and none elsewhere. Streaming awaits three more at the end of a
  load, whatever its size: which parameters nobody wrote, and which weights and other parameters hold NaN or Inf.
- An *update* is a full one from disk; tensors on the GPU already need no copies to it. Beside what a load does,
  it copies what it is about to replace to the host: each unit, and once the scales of each parameter. These copies are
  its waits ([updates](updates.md#what-an-answer-says)).
"""
