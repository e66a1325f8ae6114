# SPDX-License-Identifier: Apache-2.0
"""Entry points. They decide whether the reference platform is for this machine, at no cost where it is not."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

PLATFORM = "sglang_overlay.cpu_reference.platform:CpuReferencePlatform"


def platform() -> str | None:
    """Entry point of ``sglang.srt.platforms``: the platform's class name, or None where it does not step in."""
    return PLATFORM if is_wanted() else None


def activate() -> None:
    """Entry point of ``sglang.srt.plugins``: register the hooks, where the reference platform is the one in use."""
    if not is_wanted() or not _is_current():
        return
    from sglang_overlay.cpu_reference.catalogue import TOUCH_POINTS
    from sglang_overlay.upstream.touch_point import State, register

    for found in register(TOUCH_POINTS):
        if found.state in (State.MISSING, State.SIGNATURE):
            logger.warning(
                "streamfp8: the CPU reference platform cannot patch %s (%s: %s); models that need it will not run. "
                "`python -m sglang_overlay check` lists every patch.",
                found.point.target,
                found.state.value,
                found.detail,
            )


def is_wanted() -> bool:
    """Whether this machine has no accelerator and SGLang's own CPU engine is not asked for."""
    return os.environ.get("SGLANG_USE_CPU_ENGINE", "0") != "1" and not has_accelerator()


def has_accelerator() -> bool:
    """Whether torch sees a device SGLang has a platform for (CUDA, ROCm, XPU, NPU, MUSA, MPS)."""
    kinds = (getattr(torch, name, None) for name in ("cuda", "xpu", "npu", "musa", "mps"))
    return any(kind is not None and kind.is_available() for kind in kinds)


def _is_current() -> bool:
    from sglang.srt.platforms import current_platform

    from sglang_overlay.cpu_reference.platform import CpuReferencePlatform

    return isinstance(current_platform, CpuReferencePlatform)
