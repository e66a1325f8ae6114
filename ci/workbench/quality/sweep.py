"""Load every model family both ways in real SGLang and compare the results."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from sglang_overlay.load.snapshots import NOTED
from sglang_overlay.observe.report import LoadReport, read_folder
from sglang_overlay.settings import REPORT_VARIABLE
from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadFailed, LoadResult, LoadWorkers, compare

OUTCOMES = {
    "identical": "every layer that stock quantizes was streamed, and the models are bit-identical; where the remark "
    "says that stock keeps references to bf16 weights, streaming makes those refer to the fp8 parameters",
    "partly stock": "bit-identical; some layers took stock's path, with a warning that says why",
    "stock path": "bit-identical; the model was loaded as in stock, with one warning",
    "nothing to stream": "bit-identical; stock has no fp8 layer in it either",
    "refused": "the checkpoint lacks weights that SGLang's model has: stock serves uninitialized memory, streaming "
    "stops with an error that names them",
    "error": "streaming does not load what stock loads; must not happen",
    "differs": "the models differ; must not happen",
    "stock cannot load": "stock SGLang fails with `--quantization fp8` on a machine without a GPU",
    "cannot be built": "neither `transformers` nor SGLang builds the model from a tiny config",
}
"""Possible outcomes for an architecture, and what they mean."""

BAD = ("differs", "error")


@dataclass(frozen=True)
class Outcome:
    """The result for one architecture.

    Attributes:
        outcome: a key of ``OUTCOMES``.
        streamed, deferred, fallback: numbers of layers by how they were loaded.
        detail: the reason, or the first differences.
    """

    architecture: str
    outcome: str
    streamed: int = 0
    deferred: int = 0
    fallback: int = 0
    detail: str = ""


def try_one(architecture: str, made: Callable[[str], LoadJob], workers: LoadWorkers, reports: Path) -> Outcome:
    """Load one architecture both ways.

    Args:
        architecture: its name.
        made: makes its checkpoint, and returns a load of it.
        workers: that load it.
        reports: folder for the reports of streaming.
    """
    try:
        job = replace(made(architecture), streaming="0", uninitialized=math.nan)
    except LoadFailed as error:
        return Outcome(architecture, "cannot be built", detail=_last_error(str(error)))
    except Exception as error:
        return Outcome(architecture, "cannot be built", detail=_first_line(f"{type(error).__name__}: {error}"))
    try:
        stock = workers.load(job)
    except LoadFailed as error:
        return Outcome(architecture, "stock cannot load", detail=_last_error(str(error)))
    for old in reports.glob("*.json"):
        old.unlink()
    try:
        environ = {**job.environ, REPORT_VARIABLE: str(reports)}
        result = workers.load(replace(job, streaming="1", environ=environ))
    except LoadFailed as error:
        again = workers.load(replace(job, uninitialized=1.0))
        return Outcome(architecture, _kind_of(error, stock, again), detail=_last_error(str(error)))
    return _judged(architecture, compare(stock, result), read_folder(reports)[0])


def _judged(architecture: str, differences: list[str], report: LoadReport) -> Outcome:
    layers = report.layers
    counted = partial(
        Outcome,
        architecture,
        streamed=layers.streamed,
        deferred=len(layers.deferred),
        fallback=len(layers.fallback),
    )
    stale = [line for line in differences if any(f"{name}[" in line for name in NOTED)]
    if stale and stale == differences:
        return counted(outcome="identical", detail="stock keeps references to bf16 weights")
    if differences:
        return counted(outcome="differs", detail="; ".join(differences[:3]))
    if layers.fallback:
        return counted(outcome="partly stock", detail=layers.fallback[0].reason)
    if report.mode == "stock" and report.warnings:
        return counted(outcome="stock path", detail=report.warnings[0])
    if not layers.streamed:
        return counted(outcome="nothing to stream")
    return counted(outcome="identical")


def _kind_of(error: LoadFailed, stock: LoadResult, again: LoadResult) -> str:
    """The kind of a failure: an incomplete load is no fault if stock quantized memory that nobody had written."""
    missing = re.findall(r"([\w.]+)\.\w+ \(\d+ of \d+ units", str(error))
    one, other = stock.ranks[0].tensors, again.ranks[0].tensors
    uninitialized = {name.rpartition(".")[0] for name, print_ in one.items() if print_ != other[name]}
    return "refused" if missing and uninitialized.issuperset(missing) else "error"


def _first_line(text: str) -> str:
    """A line short enough for a table, without folders and times of log lines, which differ from run to run."""
    told = re.sub(r"(?<![\w/])/(?:[\w.+-]+/)+", "", re.sub(r"^\[?\d{4}-\d\d-\d\d [\d:,.]+\]?\s*", "", text.strip()))
    return " ".join(told.split())[:240]


def _last_error(traceback: str) -> str:
    errors = [line for line in traceback.splitlines() if re.match(r"^[\w.]*(Error|Exception|Exit|Interrupt)\b", line)]
    if not errors:
        return _first_line(traceback.strip().splitlines()[-1])
    # A table has no room for modules.
    module = errors[-1].partition(":")[0].rpartition(".")[0]
    return _first_line(traceback[traceback.rindex(errors[-1]) :].removeprefix(f"{module}."))


def to_json(release: str, outcomes: list[Outcome]) -> str:
    """The outcomes as a JSON document."""
    counts = Counter(outcome.outcome for outcome in outcomes)
    document = {"release": release, "counts": dict(sorted(counts.items())), "families": [asdict(o) for o in outcomes]}
    return json.dumps(document, indent=1) + "\n"


def to_markdown(release: str, outcomes: list[Outcome]) -> str:
    """The outcomes as a page."""
    counts = Counter(outcome.outcome for outcome in outcomes)
    listed = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    lines = [
        "# Model families",
        "",
        f"Every architecture that SGLang {release} and `transformers` share, and some that `transformers` lacks, at",
        "tiny sizes with random weights, loaded with `--quantization fp8` by stock and by streaming in real SGLang on",
        "a CPU, and compared tensor by tensor: name, dtype, shape, stride, bytes. Made by `ci/sweep`. What it says:",
        "",
        *(f"- **{outcome}**: {meaning}" for outcome, meaning in OUTCOMES.items()),
        "",
        f"{len(outcomes)} architectures: {listed}. What stock cannot load here says nothing of streaming:",
        "DeepSeek-V2 in its published proportions loads, and is compared in `tests/load/test_identity.py`.",
        "",
        "| architecture | outcome | streamed | deferred | stock's path | remark |",
        "|---|---|---|---|---|---|",
    ]
    for o in sorted(outcomes, key=lambda o: (list(OUTCOMES).index(o.outcome), o.architecture)):
        detail = o.detail.replace("|", "\\|")
        lines.append(f"| {o.architecture} | {o.outcome} | {o.streamed} | {o.deferred} | {o.fallback} | {detail} |")
    return "\n".join(lines) + "\n"
