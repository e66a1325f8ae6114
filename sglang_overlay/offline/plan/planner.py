# SPDX-License-Identifier: Apache-2.0
"""Plan all ranks of a server in all modes, and tell whether they fit."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.offline.plan.gpus import GPU
from sglang_overlay.offline.plan.job import MODES, Device, Job, Layout, Mode, Order, PlannedLoad, Serving
from sglang_overlay.offline.plan.process import Planners
from sglang_overlay.schemes.choice import SchemeChoice


class RequestError(StreamFP8Error):
    """A request is inconsistent, or its model does not exist."""


@dataclass(frozen=True)
class Request:
    """What to plan; see ``Job`` for the other attributes.

    Attributes:
        every_rank: compute each rank; otherwise the first TP rank of each pipeline stage represents its stage.
        gpus: those for which to plan what is left for serving.
    """

    model: Path
    layout: Layout = field(default_factory=Layout)
    modes: tuple[Mode, ...] = MODES
    order: Order = "sorted"
    device: Device = "cuda"
    every_rank: bool = False
    from_config: bool = False
    schemes: SchemeChoice = field(default_factory=SchemeChoice)
    server_args: tuple[tuple[str, Any], ...] = ()
    gpus: tuple[GPU, ...] = ()

    def jobs(self) -> list[Job]:
        """A job for each computed rank and mode, ranks first.

        Raises:
            RequestError: there is no model's ``config.json``, or the ranks do not divide evenly.
        """
        self._check_config()
        self._check_layout()
        base = Job(
            self.model.resolve(),
            self.layout,
            order=self.order,
            device=self.device,
            from_config=self.from_config,
            schemes=self.schemes,
            server_args=self.server_args,
            gpus=self.gpus,
        )
        return [replace(base, rank=rank, mode=mode) for rank in self.computed_ranks() for mode in self.modes]

    def _check_config(self) -> None:
        config = self.model / "config.json" if self.model.is_dir() else self.model
        if not config.is_file():
            raise RequestError(f"{config} is not there: name a folder with a config.json, or such a file")
        try:
            architectures = json.loads(config.read_text(encoding="utf-8"))["architectures"]
        except (ValueError, KeyError, TypeError) as error:
            raise RequestError(f"{config} is no model's config.json: {error!r}") from error
        if not architectures:
            raise RequestError(f"{config} names no architectures, by which SGLang finds the model's class")

    def _check_layout(self) -> None:
        layout = self.layout
        parts = {"ep": layout.ep, **({"dp": layout.dp} if layout.dp_attention else {})}
        for name, size in parts.items():
            if layout.tp % size:
                raise RequestError(f"{layout.tp} TP ranks do not divide into {size} {name.upper()} ranks")

    def computed_ranks(self) -> list[int]:
        """The ranks that are computed."""
        return list(range(0, self.layout.ranks, 1 if self.every_rank else self.layout.tp))


@dataclass(frozen=True)
class PlannedRank:
    """One computed rank in all modes.

    Attributes:
        stands_for: all ranks that this one represents, including itself.
    """

    rank: int
    stands_for: tuple[int, ...]
    loads: tuple[PlannedLoad, ...]

    def load(self, mode: Mode) -> PlannedLoad:
        """The load in one mode."""
        return next(load for load in self.loads if load.mode == mode)


@dataclass(frozen=True)
class Plan:
    """A request and its results."""

    request: Request
    release: str
    ranks: tuple[PlannedRank, ...]

    def fits(self, mode: Mode, gpu: GPU) -> bool:
        """Whether every rank's peak fits into the GPU's usable memory."""
        return all(rank.load(mode).peak <= gpu.usable for rank in self.ranks)

    def serving(self, mode: Mode, gpu: GPU) -> Serving | None:
        """What all ranks can serve together in one mode, if that was planned: what the one with the least can."""
        found = [rank.load(mode).serving_on(gpu) for rank in self.ranks]
        return min((left for left in found if left is not None), key=lambda left: left.tokens, default=None)

    def highest(self, mode: Mode) -> PlannedLoad:
        """The load of the rank that needs the most in one mode."""
        return max((rank.load(mode) for rank in self.ranks), key=lambda load: load.peak)


@dataclass(frozen=True)
class Fit:
    """The fewest tensor-parallel ranks with which a kind of GPU loads and serves a model in one mode.

    Attributes:
        tp: how many; None if there are none up to the last of ``DEGREES``.
        serving: what they serve, or what so many would.
    """

    gpu: GPU
    mode: Mode
    tp: int | None = None
    serving: Serving | None = None


DEGREES = (1, 2, 4, 8, 16)
"""Tensor-parallel degrees that are tried."""


def fits(request: Request) -> list[Fit]:
    """For each of the request's GPUs and modes: with how many ranks the longest request can be served.

    From the most ranks to the fewest, until no GPU is left. Degrees that SGLang refuses for this model are passed over.

    Raises:
        StreamFP8Error: the model does not exist, or no degree could be planned.
    """
    found = {(gpu.name, mode): Fit(gpu, mode) for gpu in request.gpus for mode in request.modes}
    refused: StreamFP8Error | None = None
    with Planners(len(os.sched_getaffinity(0))) as planners:
        for tp in reversed(DEGREES):
            asked = replace(request, layout=Layout(tp))
            try:
                planned = collect(asked, planners.run(asked.jobs()))
            except StreamFP8Error as error:
                refused = error
                continue
            now = {key: _fit(planned, tp, fit) for key, fit in found.items()}
            found.update({key: fit for key, fit in now.items() if fit.tp == tp or found[key].serving is None})
            if not any(fit.tp == tp for fit in now.values()):
                return list(found.values())
    if refused is not None and all(fit.tp is None for fit in found.values()):
        raise refused
    return list(found.values())


def _fit(planned: Plan, tp: int, fit: Fit) -> Fit:
    serving = planned.serving(fit.mode, fit.gpu)
    serves = serving is not None and serving.serves() and planned.fits(fit.mode, fit.gpu)
    return replace(fit, tp=tp if serves else None, serving=serving)


def plan(request: Request) -> Plan:
    """Plan in separate processes, at most one per core.

    Raises:
        StreamFP8Error: the model does not exist or could not be loaded.
    """
    jobs = request.jobs()
    with Planners(min(len(jobs), len(os.sched_getaffinity(0)))) as planners:
        return collect(request, planners.run(jobs))


def collect(request: Request, loads: Iterator[PlannedLoad]) -> Plan:
    """Combine the results of ``request.jobs()``, in that order."""
    from sglang_overlay.hooks import releases

    ranks = []
    for rank in request.computed_ranks():
        found = tuple(next(loads) for _ in request.modes)
        ranks.append(PlannedRank(rank, tuple(_like(request, rank)), found))
    return Plan(request, releases.installed() or "unknown", tuple(ranks))


def _like(request: Request, rank: int) -> Sequence[int]:
    return range(rank, rank + (1 if request.every_rank else request.layout.tp))
