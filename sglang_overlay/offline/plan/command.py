# SPDX-License-Identifier: Apache-2.0
"""Implements ``python -m sglang_overlay plan``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from sglang_overlay.observe import terminal
from sglang_overlay.offline.plan import document, gpus, planner, table, timeline
from sglang_overlay.offline.plan.gpus import GPU
from sglang_overlay.offline.plan.job import MODES, Layout
from sglang_overlay.offline.plan.planner import Plan, Request
from sglang_overlay.schemes import registry
from sglang_overlay.settings import load_settings

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
    request = _request(**asked)
    with terminal.waiting("Importing SGLang and loading without memory ..."):
        found = planner.plan(request)
    output(found, gpu)
    if png is not None:
        timeline.draw(found, png, f"Memory while loading {request.model.stem}, {request.order} files", gpu)
    best = "streaming" if "streaming" in request.modes else request.modes[-1]
    return int(gpu is not None and not found.fits(best, gpu))


def _request(
    *, model: Path, tp: int, ep: int, pp: int, dp: int, dp_attention: bool, modes: tuple[Any, ...], **more: Any
) -> Request:
    schemes = load_settings(os.environ).schemes
    registry.check(schemes)
    return Request(model, Layout(tp, ep, pp, dp, dp_attention), modes or MODES, schemes=schemes, **more)
