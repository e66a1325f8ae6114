# SPDX-License-Identifier: Apache-2.0
"""Load damaged checkpoints in stock and streaming SGLang: each load is stock's, or a clear error.

    for case in fuzz(family, checkpoint, folder, first=0, cases=500): ...

Case `n` is always the same damage (:mod:`harness.mutations`), so a case that failed can be run alone
(``first=n, cases=1``). All cases run in one process; where that crashes or hangs, the case under way is the culprit and
a new process goes on after it.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from harness.load_series import Attempt, LoadSeries, series_process

_SMALL = (
    ("num_hidden_layers", 2),
    ("hidden_size", 64),
    ("num_attention_heads", 2),
    ("num_key_value_heads", 1),
    ("moe_intermediate_size", 32),
)
SPECS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "family": "qwen3_moe",
        "files": 3,
        "assignment": "round_robin",
        "overrides": (*_SMALL, ("num_experts", 4), ("head_dim", 32)),
    },
    "deepseek_v3": {
        "family": "deepseek_v3",
        "files": 3,
        "assignment": "shuffled",
        "overrides": (*_SMALL, ("num_key_value_heads", 2)),
    },
}
"""The checkpoints that are damaged: `CheckpointSpec` fields."""

IN_THREADS = frozenset({"deepseek_v3"})
"""Families whose weight loaders upstream calls in threads: which of two tensors of one name is written last, and stays,
is a race in stock too (DeepSeek-V3: 4 of 60 loads went the other way)."""

AS_IN_ANOTHER_ORDER = "identical to stock in another order"
GOOD = ("identical", AS_IN_ANOTHER_ORDER, "both refuse", "streaming refuses")
_CASE_SECONDS = 60.0
_START_SECONDS = 300.0


@dataclass(frozen=True)
class Case:
    """One damaged checkpoint.

    Args:
        number: of the case, which is the mutation's seed.
        mutation: what was done to the checkpoint.
        verdict: one of `GOOD`, or what is wrong.
        stock, streaming: ``loaded``, or the error's type and first line.
    """

    number: int
    mutation: str
    verdict: str
    stock: str = ""
    streaming: str = ""

    @property
    def is_good(self) -> bool:
        """Whether it went as it should."""
        return self.verdict in GOOD


def fuzz(family: str, checkpoint: Path, folder: Path, first: int, cases: int) -> Iterator[Case]:
    """Run cases ``first`` to ``first + cases - 1`` and give them as they end. Logs lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    number, stop = first, first + cases
    while number < stop:
        results = folder / f"results-{number}.jsonl"
        results.touch()
        with series_process(
            _run_cases, folder / "log.txt", checkpoint, folder, results, number, stop, family
        ) as process:
            for case in _followed(process.is_alive, results, number, stop):
                yield case
                number = case.number + 1


def _followed(is_alive: Callable[[], bool], results: Path, number: int, stop: int) -> Iterator[Case]:
    """Cases as they are written to `results`; the last one is the culprit where the process crashes or hangs."""
    deadline = time.monotonic() + _START_SECONDS
    line = ""
    with results.open() as lines:
        while number < stop:
            alive = is_alive()
            # The other process may be in the middle of a line.
            line += lines.readline()
            if line.endswith("\n"):
                yield Case(**json.loads(line))
                line = ""
                number += 1
                deadline = time.monotonic() + _CASE_SECONDS
            elif not alive:
                yield Case(number, "see the log", "CRASHED")
                return
            elif time.monotonic() > deadline:
                yield Case(number, "see the log", "HUNG")
                return
            else:
                time.sleep(0.02)


def _run_cases(checkpoint: Path, folder: Path, results: Path, first: int, stop: int, family: str) -> None:
    """The process's side."""
    import torch

    from harness.mutations import mutate

    series = LoadSeries(checkpoint)
    # What no tensor was loaded into is NaN then, in stock and in streaming, and not what happened to lie there.
    torch.use_deterministic_algorithms(True, warn_only=True)
    damaged = folder / "case"
    with results.open("a", buffering=1) as out:
        for number in range(first, stop):
            mutation = mutate(checkpoint, number, damaged)
            print(f"--- case {number}: {mutation}", flush=True)
            stock, streaming = series.attempt(damaged, "0"), series.attempt(damaged, "1")
            case = judged(number, mutation, stock, streaming)
            if family in IN_THREADS and case.verdict == "DIFFERENT":
                copies = folder / f"case-{number}-each-alone"
                if is_stock_in_another_order(streaming, series, damaged, copies):
                    case = replace(case, verdict=AS_IN_ANOTHER_ORDER)
            out.write(json.dumps(asdict(case)) + "\n")


def is_stock_in_another_order(streaming: Attempt, series: LoadSeries, damaged: Path, copies: Path) -> bool:
    """Whether stock holds what `streaming` does when one tensor of each name in `damaged` is left, in `copies`."""
    from harness.mutations import each_rival_alone

    return any(series.attempt(copy, "0").prints == streaming.prints for copy in each_rival_alone(damaged, copies))


def judged(number: int, mutation: str, stock: Attempt, streaming: Attempt) -> Case:
    """Compare the two attempts at one checkpoint."""
    return Case(number, mutation, _verdict(stock, streaming), _told(stock), _told(streaming))


def _verdict(stock: Attempt, streaming: Attempt) -> str:
    from sglang_overlay.errors import StreamFP8Error

    if streaming.threads:
        return "THREADS LEFT"
    if streaming.held:
        return "STAGING HELD"
    if streaming.error is None:
        if stock.error is not None:
            return "ONLY STREAMING LOADS"
        return "identical" if stock.prints == streaming.prints else "DIFFERENT"
    if stock.error is not None:
        return "both refuse"
    return "streaming refuses" if isinstance(streaming.error, StreamFP8Error) else "UNCLEAN ERROR"


def _told(attempt: Attempt) -> str:
    if attempt.error is None:
        return "loaded"
    notes = getattr(attempt.error, "__notes__", [])
    return f"{type(attempt.error).__name__}: {str(attempt.error)[:600]}" + "".join(f" | {note}" for note in notes)


def summary(cases: list[Case]) -> str:
    """Counts by verdict."""
    return ", ".join(f"{verdict}: {count}" for verdict, count in Counter(case.verdict for case in cases).most_common())
