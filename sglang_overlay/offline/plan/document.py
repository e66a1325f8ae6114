# SPDX-License-Identifier: Apache-2.0
"""A plan as JSON that other programs can rely on; ``plan.schema.json`` beside this module specifies the format.

Within one version, fields are only ever added. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_overlay import __version__
from sglang_overlay.observe.memory import thin
from sglang_overlay.offline.plan.gpus import GPU
from sglang_overlay.offline.plan.job import PlannedLoad
from sglang_overlay.offline.plan.planner import Fit, Plan, PlannedRank

SCHEMA = "sglang-streamfp8/plan"
FITS_SCHEMA = "sglang-streamfp8/fits"
VERSION = 1
SCHEMA_FILE = Path(__file__).with_name("plan.schema.json")
MAX_SAMPLES = 400


def to_json(plan: Plan, gpu: GPU | None = None) -> dict[str, Any]:
    """``plan`` as plain JSON data, with the verdict for ``gpu``."""
    request = plan.request
    any_load = plan.ranks[0].loads[0]
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "release": plan.release,
        "overlay_version": __version__,
        "model": {
            "path": str(request.model),
            "architecture": any_load.architecture,
            "parameters": any_load.checkpoint_parameters,
            "bytes": any_load.checkpoint_bytes,
            "files": any_load.checkpoint_files,
            "source": any_load.checkpoint_source,
        },
        "layout": asdict(request.layout),
        "order": request.order,
        "device": request.device,
        "schemes": asdict(request.schemes),
        "ranks": [_rank(rank) for rank in plan.ranks],
        "gpu": None if gpu is None else _gpu(plan, gpu),
    }


def _gpu(plan: Plan, gpu: GPU) -> dict[str, Any]:
    modes = plan.request.modes
    serving = {mode: plan.serving(mode, gpu) for mode in modes if plan.fits(mode, gpu)}
    return {
        "name": gpu.name,
        "memory": gpu.memory,
        "usable": gpu.usable,
        "capability": gpu.capability,
        "fits": {mode: plan.fits(mode, gpu) for mode in modes},
        "serving": {mode: asdict(left) for mode, left in serving.items() if left is not None},
    }


def _rank(rank: PlannedRank) -> dict[str, Any]:
    return {
        "rank": rank.rank,
        "stands_for": list(rank.stands_for),
        "loads": {load.mode: _load(load) for load in rank.loads},
    }


def _load(load: PlannedLoad) -> dict[str, Any]:
    return {
        "peak_bytes": load.peak,
        "final_bytes": load.final,
        "staging_peak_bytes": load.staging_peak,
        "units": {"count": load.units, "direct": load.direct_units},
        "layers": {
            "streamed": load.streamed,
            "deferred": load.deferred,
            "fallback": load.fallback,
            "why_none": load.why_none,
        },
        "host": {f"{name}_bytes": size for name, size in asdict(load.host).items()},
        "device_work": asdict(load.work),
        "samples": [list(sample) for sample in thin(load.samples, MAX_SAMPLES)],
    }


def fits_to_json(model: Path, found: Sequence[Fit]) -> dict[str, Any]:
    """``planner.fits`` as plain JSON data."""
    rows = [{**asdict(fit), "gpu": fit.gpu.name} for fit in found]
    return {"schema": FITS_SCHEMA, "version": VERSION, "model": str(model), "fits": rows}
