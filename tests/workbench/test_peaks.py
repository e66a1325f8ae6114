# SPDX-License-Identifier: Apache-2.0
"""README's table of releases is what was measured, and a difference from stock cannot be overlooked in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from workbench.bench import peaks
from workbench.releases.environment import supported

PEAK = peaks.Peak("qwen3_moe", of_model=1.012, of_stock=0.455, is_identical=True)


def test_readme_shows_what_is_kept_and_nothing_else():
    page = peaks.README.read_text(encoding="utf-8")
    assert peaks.with_table(page, peaks.read(peaks.DATA)) == page


def test_releases_are_measured_in_both_forms():
    data = peaks.read(peaks.DATA)
    assert list(data) == [release for release in supported() if release in data]
    assert supported()[-1] in data
    for forms in data.values():
        assert {peak.model for form in peaks.FORMS for peak in forms[form]} == set(peaks.TITLES)
        assert all(peak.is_identical for form in peaks.FORMS for peak in forms[form])


def test_difference_from_stock_is_in_the_table():
    page = peaks.with_table(
        peaks.README.read_text(encoding="utf-8"), {"0.5.23": {"overlay": [replace(PEAK, is_identical=False)]}}
    )
    assert "| 0.5.23 | 1.01 (0.46), differs from stock | not measured | not measured | not measured |" in page


def test_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="no one place"):
        peaks.with_table("# Another page", {})
