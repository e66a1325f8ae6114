# SPDX-License-Identifier: Apache-2.0
"""Stream a bf16 checkpoint into SGLang as FP8: peak memory close to the FP8 model's own size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sglang_overlay.quantizing import quantize

__all__ = ["__version__", "quantize"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name != "quantize":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Imports torch: SGLang imports this package in every process that it starts.
    from sglang_overlay.quantizing import quantize

    return quantize
