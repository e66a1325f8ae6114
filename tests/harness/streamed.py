# SPDX-License-Identifier: Apache-2.0
"""Loads that have to be streamed, by the overlay or by an SGLang that has the patch series, and what tells that."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from workbench.loads.job import LoadJob, RankResult
from workbench.loads.loads import LoadResult

from sglang_overlay.hooks import built_in
from sglang_overlay.observe.report import LoadReport, read_folder
from sglang_overlay.settings import REPORT_VARIABLE


def load_streamed(load: Callable[[LoadJob], LoadResult], job: LoadJob, folder: Path) -> LoadResult:
    """Run a load, make sure that all of it was streamed, and by what.

    Args:
        load: of some ``LoadWorkers``.
        job: whose ``streaming`` is set here.
        folder: for reports, where the overlay streams.
    """
    if built_in.streams_itself():
        result = load(replace(job, streaming="1"))
        assert_streamed_by_sglang(result)
        return result
    result, reports = load_reported(load, replace(job, streaming="require"), folder)
    assert_streamed(reports, job.ranks)
    return result


def load_reported(
    load: Callable[[LoadJob], LoadResult], job: LoadJob, folder: Path
) -> tuple[LoadResult, Sequence[LoadReport]]:
    """Run a load of which the overlay writes reports into `folder`; the result, and all reports there."""
    result = load(replace(job, environ={**job.environ, REPORT_VARIABLE: str(folder)}))
    return result, read_folder(folder)


def warnings_of(result: LoadResult | RankResult) -> list[str]:
    """What streaming warned of."""
    found = [line for line in result.log if line.startswith("WARNING") and "StreamFP8" in line]
    assert not [line for line in found if re.search(r"\.\.(\s|$)", line)]
    return found


def assert_streamed_by_sglang(result: LoadResult) -> None:
    """Every rank says that it streamed, nothing else is said of streaming, and the overlay is not there."""
    for rank in result.ranks:
        told = [line for line in rank.log if f" {built_in.PACKAGE}." in line]
        assert len(told) == 1, told
        assert told[0].startswith(f"INFO {built_in.PACKAGE}.loading: Quantized ")
        assert not [line for line in rank.log if re.search(r" sglang_overlay\.(hooks|load|update)\b", line)]


def assert_streamed(reports: Sequence[LoadReport], ranks: int = 1) -> None:
    """No rank left a layer to stock, or found fault; only MLA's ``kv_b_proj``, needed in bf16, was put off."""
    assert len(reports) == ranks
    for report in reports:
        assert report.mode == "streaming"
        assert report.units.streamed >= report.layers.streamed > 0
        assert report.layers.fallback == ()
        assert report.warnings == ()
        assert report.missing == ()
        assert all(note.layer.endswith("kv_b_proj") for note in report.layers.deferred)
        assert_layers_add_up(report)


def assert_layers_add_up(report: LoadReport) -> None:
    """What is told of single layers is what is told of all, and happened while the model was loaded."""
    figures = report.layers.figures
    assert len({layer.layer for layer in figures}) == len(figures) == report.layers.streamed
    assert sum(layer.units for layer in figures) == report.units.streamed
    assert sum(layer.direct for layer in figures) == report.units.direct
    assert 0 < report.streamed_bytes < report.final_bytes
    assert all(0 <= layer.first_seconds <= layer.last_seconds <= report.seconds for layer in figures)
