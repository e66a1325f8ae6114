# SPDX-License-Identifier: Apache-2.0
"""Reports as one self-contained HTML page: no scripts, no fonts, no requests.

``page.html.j2`` is its template; this module computes the contents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from sglang_overlay import __version__
from sglang_overlay.observe.compare import Pair, pair_up
from sglang_overlay.observe.folders import Loads, Named, curves, subject
from sglang_overlay.observe.formats import bytes_text, count_text, seconds_text
from sglang_overlay.observe.layer_table import Layer, by_reason, layers_of
from sglang_overlay.observe.report import ReportError
from sglang_overlay.observe.terminal import rank_text, ratio_text
from sglang_overlay.observe.timeline import timeline

# The same chart in two sizes, since text in a picture shrinks with it: for wide screens and for phones.
_SIZES = ((880, 380), (400, 320))


@dataclass(frozen=True)
class Section:
    """One folder's layers."""

    name: str
    loads: Loads
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


def render(named: Sequence[Named]) -> str:
    """The page, as HTML, for one folder of reports, or for two side by side, stock first."""
    shown = curves(named)
    pairs = pair_up(named[0][1], named[1][1]) if len(named) == 2 else []
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=f"Memory while loading {subject(named[-1][1])}",
            verdict=_verdict(named, pairs),
            curves=shown,
            charts=[timeline(shown, width, height) for width, height in _SIZES],
            metrics=sorted({load.memory.metric for _, loads in named for load in loads}),
            models=sorted({load.final_bytes for _, loads in named for load in loads}),
            pairs=pairs,
            named=named,
            # Streamed loads first: they have the most details.
            sections=[Section(name, loads, tuple(layers_of(loads))) for name, loads in reversed(named)],
            version=__version__,
        )
    )


def write(named: Sequence[Named], file: Path) -> Path:
    """Write the page and return its path.

    Raises:
        ReportError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(render(named), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"the page could not be written to {file}: {error}; name a file that can be") from error
    return file


def _verdict(named: Sequence[Named], pairs: Sequence[Pair]) -> str:
    """A summary of the page in a sentence or two."""
    loads = named[-1][1]
    highest = max(loads, key=lambda load: load.memory.peak_above_start)
    peak = f"Peak {bytes_text(highest.memory.peak_above_start)} above the start"
    if highest.final_bytes:
        of_model = highest.memory.peak_above_start / highest.final_bytes
        peak += f", {ratio_text(of_model)} the loaded model's {bytes_text(highest.final_bytes)}"
    ratios = [pair.peak_ratio for pair in pairs if pair.peak_ratio is not None]
    against = f"; {ratio_text(max(ratios))} the peak of {named[0][0]}" if ratios else ""
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
    environment.globals.update(rank_text=rank_text, count_text=count_text)
    return environment
