"""The table of the series has the lines of the stored patches, and says what was measured of an earlier series."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from workbench.bench import series_table
from workbench.bench.series_table import Loaded
from workbench.releases import make_patches
from workbench.releases.environment import supported

NEWEST = supported()[-1]


def test_table_is_that_of_the_stored_series() -> None:
    assert not series_table.is_stale(), series_table.STALE


def row(loaded: Loaded) -> str:
    page = series_table.with_table(series_table.PAGE.read_text(encoding="utf-8"), {NEWEST: [loaded]})
    return next(line for line in page.splitlines() if line.startswith(f"| {NEWEST} |"))


def test_figures_say_whether_they_are_identical_and_of_this_series() -> None:
    code = make_patches.fingerprint(make_patches.stored(NEWEST))
    loaded = Loaded("qwen3_moe", 1.0, of_model=1.024, of_overlay=1.1, is_identical=True, series=code)
    assert row(loaded).endswith("| 1.02, identical, 1.10 | not measured |")
    assert "| 1.02, **differs from stock**, 1.10 |" in row(replace(loaded, is_identical=False))
    assert "| 1.02, identical, 1.10 (of an earlier series) |" in row(replace(loaded, series="another"))


def test_figures_of_other_releases_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series_table, "DATA", tmp_path / "series.json")
    loaded = Loaded("qwen3_moe", 1.0, 1.02, 1.1, True, "code")
    for release in (NEWEST, supported()[0]):
        series_table.keep(release, [loaded])
    assert list(series_table.read(series_table.DATA).items()) == [(supported()[0], [loaded]), (NEWEST, [loaded])]


def test_stale_table_fails_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(series_table.PAGE.read_text(encoding="utf-8").replace(" + ", " + 1"))
    monkeypatch.setattr(series_table, "PAGE", page)
    monkeypatch.setattr(series_table, "STALE", "stale")
    assert CliRunner().invoke(series_table.main, ["--check"]).exit_code == 1
    assert CliRunner().invoke(series_table.main, ["--render"]).exit_code == 0
    assert CliRunner().invoke(series_table.main, ["--check"]).exit_code == 0
