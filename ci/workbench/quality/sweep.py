"""Load every model family both ways in real SGLang and compare the results."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from sglang_overlay.load.snapshots import NOTED
from sglang_overlay.observe.report import LoadReport, read_folder
from sglang_overlay.settings import REPORT_VARIABLE
from workbench.loads.job import LoadJob
from workbench.loads.loads import LoadFailed, LoadResult, LoadWorkers, compare
from workbench.quality.making import Making, gpu_of, made_of

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

LACKING = "but for rows that the checkpoint lacks and nothing uses: stock leaves what was in memory there"

BAD = ("differs", "error")


@dataclass(frozen=True)
class Outcome:
    """The result for one architecture.

    Attributes:
        outcome: a key of ``OUTCOMES``.
        streamed, deferred, fallback: numbers of layers by how they were loaded.
        detail: the reason, or the first differences.
        gpu: the stand-in GPU it was loaded on; empty: the CPU.
        made_of: identifies the data that its checkpoint was made of.
    """

    outcome: str
    streamed: int = 0
    deferred: int = 0
    fallback: int = 0
    detail: str = ""
    gpu: str = ""
    made_of: str = ""

    @property
    def is_loaded(self) -> bool:
        """Whether stock and streaming have both loaded it."""
        return self.outcome not in ("stock cannot load", "cannot be built", "refused", *BAD)


def try_one(architecture: str, making: Making, reports: Path) -> Outcome:
    """Make an architecture's checkpoint, and load it both ways; reports of streaming go into that folder."""
    outcome = tried(partial(making.job, architecture), making.workers(architecture), reports)
    return replace(outcome, gpu=gpu_of(architecture), made_of=made_of(architecture))


def tried(made: Callable[[], LoadJob], workers: LoadWorkers, reports: Path) -> Outcome:
    """Load both ways what `made` makes."""
    try:
        job = replace(made(), streaming="0", uninitialized=math.nan)
    except LoadFailed as error:
        return Outcome("cannot be built", detail=_last_error(str(error)))
    except Exception as error:
        return Outcome("cannot be built", detail=_first_line(f"{type(error).__name__}: {error}"))
    try:
        stock = workers.load(job)
    except LoadFailed as error:
        return Outcome("stock cannot load", detail=_last_error(str(error)))
    for old in reports.glob("*.json"):
        old.unlink()
    try:
        environ = {**job.environ, REPORT_VARIABLE: str(reports)}
        result = workers.load(replace(job, streaming="1", environ=environ))
    except LoadFailed as error:
        return Outcome(_kind_of(error, unwritten(job, stock, workers)), detail=_last_error(str(error)))
    report = read_folder(reports)[0]
    differences = compare(stock, result)
    outcome = _judged(differences, report)
    if outcome.outcome != "differs":
        return outcome
    lacking = {f"rank 0: {name}: bytes differ" for name in unwritten(job, stock, workers)}
    left = [line for line in differences if line.partition(" (")[0] not in lacking]
    return outcome if left else replace(_judged([], report), detail=LACKING)


def unwritten(job: LoadJob, stock: LoadResult, workers: LoadWorkers) -> set[str]:
    """Names of tensors in which stock leaves, or quantizes, memory that nobody has written."""
    again = workers.load(replace(job, uninitialized=1.0)).ranks[0].tensors
    return {name for name, print_ in stock.ranks[0].tensors.items() if print_ != again[name]}


def _judged(differences: list[str], report: LoadReport) -> Outcome:
    layers = report.layers
    counted = partial(
        Outcome,
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


def _kind_of(error: LoadFailed, uninitialized: set[str]) -> str:
    """The kind of a failure: an incomplete load is no fault if stock quantized memory that nobody had written."""
    missing = re.findall(r"([\w.]+)\.\w+ \(\d+ of \d+ units", str(error))
    layers = {name.rpartition(".")[0] for name in uninitialized}
    return "refused" if missing and layers.issuperset(missing) else "error"


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


def to_json(release: str, outcomes: Mapping[str, Outcome]) -> str:
    """The outcomes as a JSON document, a line for each architecture."""
    lines = (f" {json.dumps(name)}: {json.dumps(asdict(outcome))}" for name, outcome in sorted(outcomes.items()))
    return f'{{"release": {json.dumps(release)}, "architectures": {{\n' + ",\n".join(lines) + "\n}}\n"


def from_json(text: str, release: str) -> dict[str, Outcome]:
    """The outcomes of a document; none if they are another release's."""
    document = json.loads(text)
    if document["release"] != release:
        return {}
    return {name: Outcome(**fields) for name, fields in document["architectures"].items()}


def to_markdown(release: str, outcomes: Mapping[str, Outcome]) -> str:
    """The outcomes as a page."""
    counts = Counter(outcome.outcome for outcome in outcomes.values())
    loaded = sum(outcome.is_loaded for outcome in outcomes.values())
    listed = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    lines = [
        "# Model families",
        "",
        f"Every architecture that SGLang {release} registers (each `EntryClass` of its models). Where a tiny",
        "checkpoint can be made, with random weights in the names and layout of the published one, stock and streaming",
        "load it in real SGLang with `--quantization fp8`, and are compared tensor by tensor: name, dtype, shape,",
        "stride, bytes. Made by `ci/sweep`. What it says:",
        "",
        *(f"- **{outcome}**: {meaning}" for outcome, meaning in OUTCOMES.items()),
        "",
        "*Where* says on what: the CPU, or a [stand-in GPU](gpu.md#stand-in-gpus) where SGLang's model needs CUDA.",
        "",
        f"{len(outcomes)} architectures, {loaded} of them loaded both ways: {listed}.",
        "",
        "| architecture | outcome | where | streamed | deferred | stock's path | remark |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, o in sorted(outcomes.items(), key=lambda one: (list(OUTCOMES).index(one[1].outcome), one[0])):
        detail = o.detail.replace("|", "\\|")
        where = f"{o.gpu} stand-in" if o.gpu else "CPU"
        lines.append(f"| {name} | {o.outcome} | {where} | {o.streamed} | {o.deferred} | {o.fallback} | {detail} |")
    return "\n".join(lines) + "\n"
