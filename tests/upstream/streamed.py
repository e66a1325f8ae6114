# SPDX-License-Identifier: Apache-2.0
"""What the reports of a load say when all of it was streamed."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_overlay.observe.report import LoadReport


def assert_streamed(reports: Sequence[LoadReport], ranks: int = 1) -> None:
    """No rank left a layer to stock, or found fault; only MLA's ``kv_b_proj``, needed in bf16, was put off."""
    assert len(reports) == ranks
    for report in reports:
        assert report.mode == "streaming"
        assert report.units.streamed >= report.layers.streamed > 0
        assert report.layers.fallback == ()
        assert report.warnings == ()
        assert all(note.layer.endswith("kv_b_proj") for note in report.layers.deferred)
