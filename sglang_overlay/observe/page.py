# SPDX-License-Identifier: Apache-2.0
"""Reports as one self-contained HTML page: no scripts, no fonts, no requests.

``page.html.j2`` is its template; this module computes the contents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from sglang_overlay import __version__
from sglang_overlay.observe.folders import Group, curves, subject
from sglang_overlay.observe.formats import bytes_text, count_text, ratio_text, seconds_text
from sglang_overlay.observe.labels import model_name
from sglang_overlay.observe.layer_table import Layer, by_reason, layers_of
from sglang_overlay.observe.pairs import Pair, pair_up
from sglang_overlay.observe.report import LoadReport, ReportError
from sglang_overlay.observe.timeline import timeline

# The same chart in two sizes, since text in a picture shrinks with it: for wide screens and for phones.
_SIZES = ((880, 380), (400, 320))


@dataclass(frozen=True)
class Details:
    """How the layers of one model were loaded."""

    name: str
    loads: Sequence[LoadReport]
    layers: tuple[Layer, ...]

    @property
    def seconds(self) -> float:
        """Seconds of the longest load."""
        return max(load.seconds for load in self.loads)

    @property
    def reasons(self) -> dict[str, list[Layer]]:
        """Layers that were not streamed, by reason."""
        return by_reason(self.layers)

    @property
    def warnings(self) -> list[str]:
        """Warnings of all loads, each once."""
        return list(dict.fromkeys(warning for load in self.loads for warning in load.warnings))

    @property
    def missing(self) -> list[str]:
        """Parameters that were not completely written in any load, each once."""
        return list(dict.fromkeys(name for load in self.loads for name in load.missing))

    @property
    def is_streamed(self) -> bool:
        """Whether any load was streamed."""
        return any(load.mode == "streaming" for load in self.loads)


@dataclass(frozen=True)
class Section:
    """One group's loads."""

    group: Group

    @property
    def rows(self) -> Iterable[tuple[str, LoadReport]]:
        """Each load with its name."""
        return zip(self.group.labels, self.group.loads, strict=True)

    @property
    def is_streamed(self) -> bool:
        """Whether any load was streamed."""
        return any(load.mode == "streaming" for load in self.group.loads)

    @property
    def models(self) -> list[Details]:
        """For each model its layers."""
        by_model: dict[str, list[LoadReport]] = {}
        for load in self.group.loads:
            by_model.setdefault(model_name(load), []).append(load)
        return [
            Details(self.group.name if len(by_model) == 1 else model, loads, tuple(layers_of(loads)))
            for model, loads in by_model.items()
        ]


def render(groups: Sequence[Group]) -> str:
    """The page, as HTML, for one group of loads, or for two side by side, stock first."""
    shown = curves(groups)
    pairs = pair_up(groups[0].loads, groups[1].loads) if len(groups) == 2 else []
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=f"Memory while loading {subject(groups[-1].loads)}",
            verdict=_verdict(groups, pairs),
            curves=shown,
            charts=[timeline(shown, width, height) for width, height in _SIZES],
            metrics=sorted({load.memory.metric for group in groups for load in group.loads}),
            models=sorted({load.final_bytes for group in groups for load in group.loads}),
            pairs=pairs,
            groups=groups,
            # Streamed loads first: they have the most details.
            sections=[Section(group) for group in reversed(groups)],
            version=__version__,
        )
    )


def write(groups: Sequence[Group], file: Path) -> Path:
    """Write the page and return its path.

    Raises:
        ReportError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(render(groups), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"the page could not be written to {file}: {error}; name a file that can be") from error
    return file


def _verdict(groups: Sequence[Group], pairs: Sequence[Pair]) -> str:
    """A summary of the page in a sentence or two."""
    loads = groups[-1].loads
    highest = max(loads, key=lambda load: load.memory.peak_above_start)
    peak = f"Peak {bytes_text(highest.memory.peak_above_start)} above the start"
    if highest.final_bytes:
        of_model = highest.memory.peak_above_start / highest.final_bytes
        peak += f", {ratio_text(of_model)} the loaded model's {bytes_text(highest.final_bytes)}"
    ratios = [pair.peak_ratio for pair in pairs if pair.peak_ratio is not None]
    against = f"; {ratio_text(max(ratios))} the peak of {groups[0].name}" if ratios else ""
    fell_back = len({note.layer for load in loads for note in load.layers.fallback})
    left = f" {count_text(fell_back, 'layer')} fell back to stock's path." if fell_back else ""
    return f"{peak}{against}. Loaded in {seconds_text(max(load.seconds for load in loads))}.{left}"


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sglang_overlay.observe", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(bytes=bytes_text, seconds=seconds_text, ratio=ratio_text)
    environment.globals.update(count_text=count_text)
    return environment
