# SPDX-License-Identifier: Apache-2.0
"""The workbench's chart style, like that of ``sglang_overlay/observe/chart.py``."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sglang_overlay.observe.chart import GRID, INK


def empty_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, to be written as a PNG; without pyplot, whose state is global."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def dress(panel: Any) -> None:
    """Style grid, ticks and frame."""
    panel.grid(visible=True, color=GRID, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=INK)
    panel.spines[["top", "right"]].set_visible(False)
