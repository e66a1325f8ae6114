# SPDX-License-Identifier: Apache-2.0
"""The tables of releases are what was measured; a difference from stock cannot be overlooked in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from workbench.bench import peaks
from workbench.bench.peaks import Figures
from workbench.releases import make_patches
from workbench.releases.environment import supported

NEWEST = supported()[-1]
SERIES = make_patches.fingerprint(make_patches.stored(NEWEST))
FIGURES = Figures("qwen3_moe", 2.0, 1.012, 0.455, True, 1.024, True, 1.1, SERIES)


def test_tables_are_those_of_the_stored_series_and_figures() -> None:
    assert [path.name for path, page, wanted in peaks.pages() if page != wanted] == [], peaks.STALE


def test_what_was_measured_is_bit_identical_and_near_the_model() -> None:
    for figures in peaks.read(peaks.DATA).values():
        assert [each.model for each in figures] == list(peaks.TITLES)
        assert all(each.is_identical and each.series_is_identical for each in figures)
        assert all(each.of_model <= 1.03 for each in figures)


def row(path: Path, figures: Figures) -> str:
    page = path.read_text(encoding="utf-8")
    write = peaks.with_overlay_table if path == peaks.RELEASES else peaks.with_series_table
    lines = write(page, {NEWEST: [figures]}).partition("<!-- ci/peaks")[2].splitlines()
    return next(line for line in lines if line.startswith(f"| {NEWEST} |"))


def test_difference_from_stock_is_in_the_tables() -> None:
    assert row(peaks.RELEASES, FIGURES) == f"| {NEWEST} | 1.01 (0.46) | not measured |"
    assert ", **differs from stock** |" in row(peaks.RELEASES, replace(FIGURES, is_identical=False))
    assert row(peaks.PATCHES, FIGURES).endswith("| 1.02, 1.10 | not measured |")
    assert ", **differs from stock** |" in row(peaks.PATCHES, replace(FIGURES, series_is_identical=False))


def test_figures_of_an_earlier_series_say_so() -> None:
    assert "| 1.02, 1.10 (of an earlier series) |" in row(peaks.PATCHES, replace(FIGURES, series="another"))


def test_figures_of_other_releases_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peaks, "DATA", tmp_path / "peaks.json")
    for release in (NEWEST, supported()[0]):
        peaks.keep(release, [FIGURES])
    assert list(peaks.read(peaks.DATA).items()) == [(supported()[0], [FIGURES]), (NEWEST, [FIGURES])]


def test_stale_table_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(peaks.PATCHES.read_text(encoding="utf-8").replace(" + ", " + 1"))
    monkeypatch.setattr(peaks, "PATCHES", page)
    assert CliRunner().invoke(peaks.main, ["--check"]).exit_code == 1
    assert CliRunner().invoke(peaks.main, ["--render"]).exit_code == 0
    assert CliRunner().invoke(peaks.main, ["--check"]).exit_code == 0


def test_page_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="no one place"):
        peaks.with_overlay_table("# Another page", {})
