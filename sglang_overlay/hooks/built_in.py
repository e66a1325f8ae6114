# SPDX-License-Identifier: Apache-2.0
"""Detect an SGLang with this project's patch series applied, by its files, without importing it."""

from __future__ import annotations

from sglang_overlay.hooks import releases

PACKAGE = "sglang.srt.layers.quantization.streaming_fp8"
"""The package that the series adds."""

NOTE = (
    "this SGLang streams fp8 loads itself (it has the patch series), so the overlay stands aside. Reports, schemes, "
    "weight updates and SGLANG_STREAMFP8=require are the overlay's alone"
)

NEXT_STEP = "Unset it, or use SGLang's own release"


def streams_itself() -> bool:
    """Whether the installed SGLang streams fp8 loads without the overlay."""
    root = releases.root()
    return root is not None and root.joinpath(*PACKAGE.split("."), "__init__.py").is_file()
