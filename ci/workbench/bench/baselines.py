"""Baselines: the recorded figures of plans and small real loads, to compare with current ones.

A baseline is a JSON file for each model and release under ``ci/baselines/<release>/``. Figures of the planner are
exact, so any difference counts, also a smaller figure: refresh the baseline, and the diff shows by how much. Peaks of
real loads may be higher by a tolerance; lower is no regression.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_overlay.observe.memory import thin
from sglang_overlay.offline.plan.job import PlannedLoad, Sample
from sglang_overlay.offline.plan.planner import Plan

FOLDER = Path(__file__).resolve().parents[2] / "baselines"
MEASURED_TOLERANCE = 0.03
"""Tolerance for a peak measured in a real load. Threads and malloc differ by about 1 % from run to run."""

_SAMPLES = 60
_PLANNED = ("peak_bytes", "final_bytes", "staging_peak_bytes", "units", "direct_units", "deferred", "fallback")

Figures = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """One figure that differs from the baseline."""

    plan: str
    load: str
    figure: str
    before: float
    now: float

    @property
    def change(self) -> str:
        """For a table: '+12.3 %'."""
        return f"{(self.now - self.before) / self.before:+.2%}" if self.before else "new"


@dataclass(frozen=True)
class Found:
    """Current figures, to be compared with the baseline of the same name or to replace it.

    Attributes:
        kind: ``planned`` or ``measured``: the section of the baseline that has its figures.
        figures: by mode.
        facts: other facts about the model in the baseline.
        compare: returns the differences that count, given the baseline's figures.
    """

    name: str
    kind: str
    figures: Mapping[str, Figures]
    facts: Mapping[str, Any]
    compare: Callable[[Mapping[str, Figures]], list[Difference]]


def planned(name: str, plan: Plan) -> Found:
    """Figures of a plan, of the rank that needs the most in each mode. Every difference counts."""
    figures: dict[str, Figures] = {mode: _figures(plan.highest(mode)) for mode in plan.request.modes}
    load = plan.ranks[0].loads[0]
    facts = {"parameters": load.checkpoint_parameters, "bytes": load.checkpoint_bytes}
    return Found(name, "planned", figures, facts, lambda before: _every_difference(name, before, figures))


def measured(name: str, peaks: Mapping[str, int]) -> Found:
    """Peaks of real loads. Only a peak that is higher by more than the tolerance counts."""
    figures = {mode: {"peak_bytes": peak} for mode, peak in peaks.items()}
    return Found(name, "measured", figures, {}, lambda before: _higher_peaks(name, before, figures))


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


def _every_difference(name: str, before: Mapping[str, Figures], now: Mapping[str, Figures]) -> list[Difference]:
    """All figures that differ; a mode that only one side has differs in all of them."""
    differences = []
    for mode in dict.fromkeys([*before, *now]):
        old, new = before.get(mode, {}), now.get(mode, {})
        for figure in _PLANNED:
            if old.get(figure) != new.get(figure):
                differences.append(Difference(name, mode, figure, old.get(figure, 0), new.get(figure, 0)))
    return differences


def _higher_peaks(name: str, before: Mapping[str, Figures], now: Mapping[str, Figures]) -> list[Difference]:
    return [
        Difference(name, mode, "peak_bytes", before.get(mode, {}).get("peak_bytes", 0), figures["peak_bytes"])
        for mode, figures in now.items()
        if figures["peak_bytes"] > before.get(mode, {}).get("peak_bytes", 0) * (1 + MEASURED_TOLERANCE)
    ]


def samples_of(figures: Figures) -> tuple[Sample, ...]:
    """The timeline in a baseline."""
    return tuple((read, held) for read, held in figures["samples"])


def path_of(release: str, name: str, folder: Path = FOLDER) -> Path:
    """The file of one plan."""
    return folder / release / f"{name}.json"


def read(path: Path) -> dict[str, Any]:
    """A baseline; empty if there is none."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def refresh(now: Found, release: str, folder: Path = FOLDER) -> Path:
    """Make ``now`` the baseline; returns its file."""
    path = path_of(release, now.name, folder)
    write(path, {**read(path), "name": now.name, "release": release, **now.facts, now.kind: now.figures})
    return path


def write(path: Path, baseline: Mapping[str, Any]) -> None:
    """Write a baseline with one figure per line and each timeline in one line, so that diffs are readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = json.dumps(_marked(baseline), indent=2).replace('"[[', "[[").replace(']]"', "]]")
    path.write_text(lines + "\n", encoding="utf-8")


def _marked(value: Any) -> Any:
    """``value`` with lists of samples as strings, which the encoder keeps in one line."""
    if isinstance(value, Mapping):
        return {key: json.dumps(item) if key == "samples" else _marked(item) for key, item in value.items()}
    return value
