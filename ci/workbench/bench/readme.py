# SPDX-License-Identifier: Apache-2.0
"""README.md's table of figures, from what is published: docs/bench.json and the newest release's baselines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sglang_overlay.observe.formats import bytes_text
from workbench.bench import page_tables
from workbench.bench.bench import STOCK, STREAMING, Run, figures, ratio
from workbench.bench.plans import PublishedPlan
from workbench.releases.environment import CLONE

PAGE = CLONE / "README.md"
BENCH = CLONE / "docs" / "bench.json"
_MEASURED = {"qwen3_moe": "Qwen3-MoE, 4 GB in bf16", "deepseek_v3": "DeepSeek-V3 shaped, 4 GB in bf16"}
_PLANNED = (("Qwen3-235B-A22B", 8), ("DeepSeek-V3", 8))
_HEADER = ("", "how", "stock peak:", "streaming peak:", "FP8 model:", "load time / stock's:")


def with_table(page: str, bench: Mapping[str, Any], plans: Sequence[tuple[PublishedPlan, Mapping[str, Any]]]) -> str:
    """The page with its table replaced. Each figure is that of the worse order of files.

    Raises:
        ValueError: the page has no place for it.
    """
    rows = [*_measured(bench), ["the same on a GPU", "not yet", "", "", "", ""], *_planned(plans)]
    return page_tables.with_table(page, "ci/plans", _HEADER, rows)


def _measured(bench: Mapping[str, Any]) -> Iterator[list[str]]:
    for family, title in _MEASURED.items():
        cases = [[Run(**run) for run in case["runs"]] for case in bench["cases"] if case["family"] == family]
        stock, streaming = ([figures(runs)[name] for runs in cases] for name in (STOCK.name, STREAMING.name))
        peaks = [bytes_text(max(found.peak for found in loads)) for loads in (stock, streaming)]
        model = bytes_text(max(found.peak / found.peak_of_final for found in streaming))
        slowest = max(ratio(runs, STREAMING.name, STOCK.name, "seconds") for runs in cases)
        yield [title, "measured, CPU", *peaks, model, f"{slowest:.2f}"]


def _planned(plans: Sequence[tuple[PublishedPlan, Mapping[str, Any]]]) -> Iterator[list[str]]:
    for model, tp in _PLANNED:
        loads = [baseline["planned"] for plan, baseline in plans if (plan.model, plan.tp) == (model, tp)]
        peaks = [bytes_text(max(load[mode]["peak_bytes"] for load in loads)) for mode in ("stock", "streaming")]
        final = bytes_text(max(load["streaming"]["final_bytes"] for load in loads))
        yield [f"{model}, a rank at TP {tp}", "[planned](docs/plans.md)", *peaks, final, ""]
