# SPDX-License-Identifier: Apache-2.0
"""Detect an SGLang with this project's patch series applied, by its files, without importing it."""

from __future__ import annotations

from sglang_overlay.hooks import releases

PACKAGE = "sglang.srt.layers.quantization.streaming_fp8"
"""The package that the series adds."""

NOTE = (
    "this SGLang has the patch series; the overlay streams in its place, with reports, schemes, weight updates and "
    "SGLANG_STREAMFP8=require"
)


def streams_itself() -> bool:
    """Whether the installed SGLang streams fp8 loads where the overlay is not installed."""
    root = releases.root()
    return root is not None and root.joinpath(*PACKAGE.split("."), "__init__.py").is_file()
