# SPDX-License-Identifier: Apache-2.0
"""Implements ``python -m sglang_overlay plan``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from sglang_overlay.load.checkpoint_files import in_hub_cache
from sglang_overlay.observe import terminal
from sglang_overlay.offline.plan import document, gpus, planner, table, timeline
from sglang_overlay.offline.plan.gpus import GPU
from sglang_overlay.offline.plan.job import MODES, Layout, Mode
from sglang_overlay.offline.plan.planner import Plan, Request, RequestError
from sglang_overlay.schemes import registry
from sglang_overlay.settings import load_settings

_PARTS_OF_A_NAME = 2
"""Owner and name."""

Output = Callable[[Plan, "GPU | None"], None]


def JSON(plan: Plan, gpu: GPU | None) -> None:  # noqa: N802 - the name of a format
    """Print the plan as JSON."""
    click.echo(json.dumps(document.to_json(plan, gpu), indent=2))


def TABLE(plan: Plan, gpu: GPU | None) -> None:  # noqa: N802 - the name of a format
    """Print the plan as a table."""
    table.print_plan(terminal.console(), plan, gpu)


def run(asked: Mapping[str, Any], gpu_name: str | None, png: Path | None, output: Output) -> int:
    """Plan, print the plan, and return the exit code: 1 if streaming does not fit the GPU.

    Raises:
        StreamFP8Error: it cannot be planned.
    """
    gpu = None if gpu_name is None else gpus.find(gpu_name)
    request = _request(gpu, **asked)
    with terminal.waiting("Importing SGLang and loading without memory ..."):
        found = planner.plan(request)
    output(found, gpu)
    if png is not None:
        timeline.draw(found, png, f"Memory while loading {request.model.stem}, {request.order} files", gpu)
    return int(gpu is not None and not found.fits(_judged(request), gpu))


def run_fits(asked: Mapping[str, Any], gpu_name: str | None, *, as_json: bool) -> int:
    """Print which GPUs load and serve the model; the exit code: 1 if none does with streaming.

    Raises:
        StreamFP8Error: it cannot be planned.
    """
    kinds = gpus.known() if gpu_name is None else (gpus.find(gpu_name),)
    request = replace(_request(None, **asked), gpus=kinds)
    if not asked["modes"]:
        request = replace(request, modes=("stock", "streaming"))
    with terminal.waiting("Importing SGLang and loading without memory ..."):
        found = planner.fits(request)
    if as_json:
        click.echo(json.dumps(document.fits_to_json(request.model, found), indent=2))
    else:
        table.print_fits(terminal.console(), request.model.name, found)
    return int(all(fit.tp is None for fit in found if fit.mode == _judged(request)))


def _judged(request: Request) -> Mode:
    """The mode that the exit code is about."""
    return "streaming" if "streaming" in request.modes else request.modes[-1]


def _request(
    gpu: GPU | None,
    *,
    model: Path,
    tp: int,
    ep: int,
    pp: int,
    dp: int,
    dp_attention: bool,
    modes: tuple[Any, ...],
    served: Mapping[str, Any],
    **more: Any,
) -> Request:
    schemes = load_settings(os.environ).schemes
    registry.check(schemes)
    return Request(
        in_cache(model),
        Layout(tp, ep, pp, dp, dp_attention),
        modes or MODES,
        schemes=schemes,
        server_args=tuple((name, value) for name, value in served.items() if value is not None),
        gpus=(gpu,) if gpu is not None and more["device"] == "cuda" else (),
        **more,
    )


def in_cache(model: Path) -> Path:
    """``model`` or, if it is a name on the hub, its folder in this machine's cache of the hub.

    Raises:
        RequestError: it is such a name, and not in the cache.
    """
    if model.exists() or model.is_absolute() or len(model.parts) != _PARTS_OF_A_NAME:
        return model
    cached = in_hub_cache(str(model))
    if cached is None:
        raise RequestError(
            f"{model} is no folder, and no model of that name is in this machine's cache of the hub: download at least "
            f"its config.json (`hf download {model} config.json`), or name a folder with a config.json"
        )
    return cached
