# SPDX-License-Identifier: Apache-2.0
"""A recorder of ``LoadJob``: stock's linear layers are quantized by channel, as where cutlass's fp8 kernels run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from sglang.srt.layers.quantization import fp8

from sglang_overlay.offline.plan.replacing import replaced


def by_channel() -> AbstractContextManager[Any]:
    return replaced(fp8, "cutlass_fp8_supported", lambda: True)
