# SPDX-License-Identifier: Apache-2.0
"""Load reports for tests, of which each says only what it is about."""

from dataclasses import replace
from typing import Any

from sglang_overlay.observe.memory import MemoryUsage
from sglang_overlay.observe.report import LoadReport


def load_report(**fields: Any) -> LoadReport:
    """A report with these fields; what identifies the load is the same in all of them."""
    common = {"release": "0.5.23", "overlay_version": "0.1.0", "model_path": "models/moe", "load_format": "auto"}
    return LoadReport(**{**common, **fields})


GB = 10**9
STOCK_LOAD = load_report(
    model_path="/somewhere/moe-1b",
    mode="stock",
    seconds=10.0,
    memory=MemoryUsage("RssAnon", GB, 2_500_000_000, GB, ((0.0, 0), (8.0, 2_500_000_000), (10.0, GB))),
    final_bytes=1_250_000_000,
)
STREAMED_LOAD = replace(
    STOCK_LOAD,
    mode="streaming",
    seconds=6.0,
    memory=MemoryUsage("RssAnon", GB, 1_375_000_000, GB, ((0.0, 0), (6.0, 1_375_000_000))),
)
"""The same model, in 0.6 of the time and 0.55 of the peak."""
