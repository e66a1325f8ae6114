# SPDX-License-Identifier: Apache-2.0
"""Stream a bf16 checkpoint into SGLang as FP8: peak memory close to the FP8 model's own size."""

__version__ = "0.1.0"
