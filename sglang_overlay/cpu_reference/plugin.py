# SPDX-License-Identifier: Apache-2.0
"""Entry points. They decide whether the reference platform is for this machine, at no cost where it is not."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

    from sglang_overlay.upstream.touch_point import TouchPoint

logger = logging.getLogger(__name__)

PLATFORM = "sglang_overlay.cpu_reference.platform:CpuReferencePlatform"


def platform() -> str | None:
    """Entry point of ``sglang.srt.platforms``: the platform's class name, or None where it does not step in."""
    return PLATFORM if is_wanted() else None


def activate() -> None:
    """Entry point of ``sglang.srt.plugins``: patch SGLang, where the reference platform is the one in use.

    Each patch is applied when SGLang imports the module it belongs to: not all of its processes do, and importing those
    modules takes seconds.
    """
    if not is_wanted() or not _is_current():
        return
    import wrapt

    from sglang_overlay.cpu_reference.attention import MLA_HANDLERS, select_absorbed_mla
    from sglang_overlay.cpu_reference.catalogue import OWN_METHODS, TOUCH_POINTS
    from sglang_overlay.upstream.touch_point import by_module

    for module, points in by_module((*TOUCH_POINTS, *OWN_METHODS)).items():
        wrapt.register_post_import_hook(partial(_patch, points), module)
    wrapt.register_post_import_hook(select_absorbed_mla, MLA_HANDLERS)


def _patch(points: tuple[TouchPoint, ...], _module: ModuleType) -> None:
    from sglang_overlay.upstream.touch_point import apply

    mismatch = apply(points)
    if mismatch is not None:
        logger.warning("streamfp8: the CPU reference platform is incomplete, models may fail on it: %s", mismatch)


def is_wanted() -> bool:
    """Whether this machine has no accelerator and SGLang's own CPU engine is not asked for."""
    return os.environ.get("SGLANG_USE_CPU_ENGINE", "0") != "1" and not has_accelerator()


def has_accelerator() -> bool:
    """Whether torch sees a device SGLang has a platform for (CUDA, ROCm, XPU, NPU, MUSA, MPS)."""
    import torch

    kinds = (getattr(torch, name, None) for name in ("cuda", "xpu", "npu", "musa", "mps"))
    return any(kind is not None and kind.is_available() for kind in kinds)


def _is_current() -> bool:
    from sglang.srt.platforms import current_platform

    from sglang_overlay.cpu_reference.platform import CpuReferencePlatform

    return isinstance(current_platform, CpuReferencePlatform)
