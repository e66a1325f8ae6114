"""Baselines: what plans and small real loads needed when last looked at, and whether they need more now.

A baseline is a JSON file for each model and release under ``ci/baselines/<release>/``. Figures of the planner are
exact, so any difference counts, also a smaller one: refresh the baseline, and the diff shows by how much. Peaks of real
loads may be higher by a tolerance; lower is no regression.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_overlay.observe.memory import thin
from sglang_overlay.plan.job import PlannedLoad, Sample
from sglang_overlay.plan.planner import Plan

FOLDER = Path(__file__).resolve().parents[1] / "baselines"
MEASURED_TOLERANCE = 0.03
"""Of a peak measured in a real load. Threads and malloc differ by about 1 % from run to run."""

_SAMPLES = 60
_PLANNED = ("peak_bytes", "final_bytes", "staging_peak_bytes", "units", "direct_units", "deferred", "fallback")

Figures = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One figure that is not as it was."""

    plan: str
    load: str
    figure: str
    before: float
    now: float

    @property
    def change(self) -> str:
        """For a table: '+12.3 %'."""
        return f"{(self.now - self.before) / self.before:+.2%}" if self.before else "new"


def figures_of(plan: Plan) -> Figures:
    """Of the rank that needs the most, by mode."""
    return {mode: _figures(plan.highest(mode)) for mode in plan.request.modes}


def facts_of(plan: Plan) -> dict[str, Any]:
    """What a plan says of the checkpoint."""
    load = plan.ranks[0].loads[0]
    return {"parameters": load.checkpoint_parameters, "bytes": load.checkpoint_bytes}


def _figures(load: PlannedLoad) -> Figures:
    return {
        "peak_bytes": load.peak,
        "final_bytes": load.final,
        "staging_peak_bytes": load.staging_peak,
        "units": load.units,
        "direct_units": load.direct_units,
        "deferred": load.deferred,
        "fallback": load.fallback,
        "samples": [list(sample) for sample in thin(load.samples, _SAMPLES)],
    }


def compare_planned(name: str, before: Mapping[str, Figures], now: Mapping[str, Figures]) -> list[Difference]:
    """Every figure of a plan that differs; a mode that is only on one side differs in everything."""
    differences = []
    for mode in dict.fromkeys([*before, *now]):
        old, new = before.get(mode, {}), now.get(mode, {})
        for figure in _PLANNED:
            if old.get(figure) != new.get(figure):
                differences.append(Difference(name, mode, figure, old.get(figure, 0), new.get(figure, 0)))
    return differences


def compare_measured(name: str, before: Mapping[str, Figures], now: Mapping[str, Figures]) -> list[Difference]:
    """Peaks of real loads that are higher than before by more than the tolerance."""
    return [
        Difference(name, f"{mode}, measured", "peak_bytes", old["peak_bytes"], now[mode]["peak_bytes"])
        for mode, old in before.items()
        if mode in now and now[mode]["peak_bytes"] > old["peak_bytes"] * (1 + MEASURED_TOLERANCE)
    ]


def samples_of(figures: Figures) -> tuple[Sample, ...]:
    """The timeline in a baseline."""
    return tuple((read, held) for read, held in figures["samples"])


def path_of(release: str, name: str, folder: Path = FOLDER) -> Path:
    """The file of one plan."""
    return folder / release / f"{name}.json"


def read(path: Path) -> dict[str, Any]:
    """A baseline; empty where there is none."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, baseline: Mapping[str, Any]) -> None:
    """Write a baseline so that a diff of two shows figures line by line, and each timeline as one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(_marked(baseline), indent=2).replace('"[[', "[[").replace(']]"', "]]")
    path.write_text(lines + "\n", encoding="utf-8")


def _marked(value: Any) -> Any:
    """Lists of samples as texts, which the encoder leaves in one line."""
    if isinstance(value, Mapping):
        return {key: json.dumps(item) if key == "samples" else _marked(item) for key, item in value.items()}
    return value
