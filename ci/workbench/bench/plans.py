"""The models whose plans are published and compared with baselines, their layouts, and the page that shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_overlay.observe.formats import bytes_text
from sglang_overlay.offline.plan import gpus
from sglang_overlay.offline.plan.job import MODES, Layout, Order
from sglang_overlay.offline.plan.planner import Plan, Request, collect
from sglang_overlay.offline.plan.timeline import LABELS
from workbench.bench import page_tables

if TYPE_CHECKING:
    from sglang_overlay.offline.plan.process import Planners

CONFIGS = Path(__file__).resolve().parents[3] / "tests" / "offline" / "plan" / "configs"
PAGE = Path(__file__).resolve().parents[3] / "docs" / "plans.md"
ORDERS: tuple[Order, ...] = ("sorted", "shuffled")
_SIZES = {
    "Qwen1.5-MoE-A2.7B": (1, 2, 8),
    "Qwen3-30B-A3B": (1, 2, 8),
    "Qwen3-235B-A22B": (2, 8),
    "DeepSeek-V2-Lite": (1, 2, 8),
    "DeepSeek-V2": (2, 8),
    "DeepSeek-V3": (8,),
    "Llama-4-Maverick": (8,),
    "Gemma-4-26B-A4B": (1,),
    "GPT-OSS-120B": (1,),
    "Mixtral-8x22B": (2,),
    "Nemotron-H-56B": (1,),
    "MiniMax-M2": (2,),
    "Qwen3-VL-235B-A22B": (8,),
    "Qwen3-Next-80B-A3B": (1,),
    "Qwen3.5-397B-A17B": (8,),
    "GLM-5": (8,),
    "DeepSeek-V3.2": (8,),
    "Kimi-K2": (8,),
}
"""TP sizes at which a rank's FP8 weights fit one of the largest GPUs."""

CHECKED_ALWAYS = ("Qwen1.5-MoE-A2.7B-tp8-sorted", "DeepSeek-V2-Lite-tp8-shuffled")
"""Plans that the test suite compares with their baselines, in seconds; the others are compared every night."""


@dataclass(frozen=True)
class PublishedPlan:
    """One model at one TP size in one order of files."""

    model: str
    tp: int
    order: Order

    @property
    def name(self) -> str:
        """Name for files and tables."""
        return f"{self.model}-tp{self.tp}-{self.order}"

    @property
    def names(self) -> set[str]:
        """The names that select it."""
        return {self.model, f"{self.model}-tp{self.tp}", self.name}

    @property
    def config(self) -> Path:
        """The model's ``config.json``."""
        return CONFIGS / f"{self.model}.json"

    @property
    def request(self) -> Request:
        """The planner's request."""
        return Request(self.config, Layout(tp=self.tp), MODES, self.order)

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts."""
        return "experts" in self.config.read_text(encoding="utf-8")


def published(names: Sequence[str] = ()) -> list[PublishedPlan]:
    """All plans, or those selected by names: a model, a model at a TP size (``DeepSeek-V3-tp8``), or a plan."""
    plans = [PublishedPlan(model, tp, order) for model, sizes in _SIZES.items() for tp in sizes for order in ORDERS]
    return [plan for plan in plans if not names or not plan.names.isdisjoint(names)]


def compute(planners: Planners, plans: Iterable[PublishedPlan]) -> Iterator[tuple[PublishedPlan, Plan]]:
    """Compute each plan, in order; loads run in parallel on all workers."""
    listed = list(plans)
    loads = planners.run([job for found in listed for job in found.request.jobs()])
    for found in listed:
        yield found, collect(found.request, loads)


def to_markdown(release: str, found: Sequence[tuple[PublishedPlan, Mapping[str, Any]]]) -> str:
    """The page: a row for each plan, from its baseline."""
    lines = [
        "# Planned peaks of published models",
        "",
        f"What `python -m sglang_overlay plan` says of SGLang {release} for one rank on a GPU, bf16 served as FP8.",
        "`ci/baseline --refresh` works it out, `ci/plans` writes this page. Names and shapes come from each model's",
        "`config.json` alone; [planner.md](planner.md) says what is counted.",
        "",
        _summary_table(found),
        "*Whole layers* holds layers in bf16 until they are complete, which with shuffled files can be most of them at",
        "once (vLLM #31914, SGLang #17945). *Complete layers* makes a layer when it has all of it (vLLM 0.33). Of",
        "loads other than the former the higher peak of both orders is shown.",
        "",
        "## Each order of files",
        "",
        page_tables.markdown(_COLUMNS, [_row(published_plan, baseline) for published_plan, baseline in found]),
        "*Open* is the most high-precision memory of layers, or of units, of which a part has not been read yet.",
        "*Loads on* is the smallest GPU of the planner's table on which a twentieth of the memory is left at the peak,",
        "and on which SGLang serves fp8 experts: an A100 loads them, and has no e4m3 in Triton to compute with.",
        "",
        "A model that is published in FP8 or MXFP4, such as DeepSeek-V3 or GPT-OSS-120B, is planned as a bf16 copy,",
        "and without its layers for multi-token prediction.",
        "`tests/offline/plan/configs/README.md` says where each configuration comes from.",
    ]
    return "\n".join(lines) + "\n"


_COLUMNS = (
    "model",
    "parameters:",
    "TP:",
    "files",
    *(f"{LABELS[mode]} peak:" for mode in MODES),
    "FP8 model:",
    "streaming / model:",
    "open: whole layers:",
    "open: units:",
    "stock loads on",
    "streaming loads on",
)


def _summary_table(found: Iterable[tuple[PublishedPlan, Mapping[str, Any]]]) -> str:
    """A row for each model and TP size, from the baselines of both orders of files."""
    layouts: dict[tuple[str, int, bool], dict[Order, Mapping[str, Any]]] = {}
    for plan, baseline in found:
        layouts.setdefault((plan.model, plan.tp, plan.has_experts), {})[plan.order] = baseline["planned"]
    rows = [[model, str(tp), *_summary(orders, experts)] for (model, tp, experts), orders in layouts.items()]
    return page_tables.markdown(_SUMMARY, rows)


_SUMMARY = (
    "model",
    "TP:",
    "stock:",
    "whole layers, files sorted:",
    "shuffled:",
    "complete layers:",
    "streaming:",
    "FP8 model:",
    "stock loads on",
    "streaming loads on",
)


def _summary(orders: Mapping[Order, Mapping[str, Any]], experts: bool) -> list[str]:  # noqa: FBT001
    """A row: the higher figure of both file orders where it depends on that, except for whole layers."""
    stock, complete, streaming = (
        max(loads[mode]["peak_bytes"] for loads in orders.values())
        for mode in ("stock", "complete_layers", "streaming")
    )
    layers = [orders[order]["layers"]["peak_bytes"] if order in orders else 0 for order in ORDERS]
    (model,) = {loads["streaming"]["final_bytes"] for loads in orders.values()}
    sizes = [bytes_text(size) if size else "not planned" for size in (stock, *layers, complete, streaming, model)]
    return [*sizes, _smallest_gpu(stock, experts), _smallest_gpu(streaming, experts)]


def _row(published_plan: PublishedPlan, baseline: Mapping[str, Any]) -> list[str]:
    loads = baseline["planned"]
    streaming = loads["streaming"]
    return [
        published_plan.model,
        f"{baseline['parameters'] / 1e9:.1f} B",
        str(published_plan.tp),
        published_plan.order,
        *(bytes_text(loads[mode]["peak_bytes"]) for mode in MODES),
        bytes_text(streaming["final_bytes"]),
        f"{streaming['peak_bytes'] / streaming['final_bytes']:.3f}",
        bytes_text(loads["layers"]["staging_peak_bytes"]),
        bytes_text(streaming["staging_peak_bytes"]),
        *(_smallest_gpu(loads[mode]["peak_bytes"], published_plan.has_experts) for mode in ("stock", "streaming")),
    ]


def _smallest_gpu(peak: int, experts: bool) -> str:  # noqa: FBT001
    serving = (gpu for gpu in gpus.known() if gpu.serves_experts or not experts)
    fitting = [gpu for gpu in sorted(serving, key=lambda gpu: gpu.memory) if peak <= gpu.usable]
    return fitting[0].name if fitting else "none"
