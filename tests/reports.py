# SPDX-License-Identifier: Apache-2.0
"""Load reports for tests, of which each says only what it is about."""

from typing import Any

from sglang_overlay.observe.report import LoadReport


def load_report(**fields: Any) -> LoadReport:
    """A report with these fields; what identifies the load is the same in all of them."""
    common = {"release": "0.5.23", "overlay_version": "0.1.0", "model_path": "models/moe", "load_format": "auto"}
    return LoadReport(**{**common, **fields})
