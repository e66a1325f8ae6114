# SPDX-License-Identifier: Apache-2.0
"""Entry points. They decide whether the reference platform is wanted, at no cost where it is not."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING

from sglang_overlay.hooks.plugin import SETTINGS_PREFIX

if TYPE_CHECKING:
    from types import ModuleType

    from sglang_overlay.hooks.hook import Hook

logger = logging.getLogger(__name__)

PLATFORM = "sglang_overlay.cpu_reference.platform:CpuReferencePlatform"


def platform() -> str | None:
    """Entry point of ``sglang.srt.platforms``: the platform's class name, or None where it does not step in."""
    if not is_wanted():
        return None
    from sglang_overlay.cpu_reference import unasked

    unasked.answer_for_kernels()
    return PLATFORM


def activate() -> None:
    """Entry point of ``sglang.srt.plugins``: patch SGLang, where the reference platform is the one in use.

    Each patch is applied when SGLang imports the module it belongs to: not all of its processes do, and importing those
    modules takes seconds.
    """
    if not is_wanted() or not _is_current():
        return
    from sglang_overlay.core.executor import register
    from sglang_overlay.cpu_reference import unasked
    from sglang_overlay.cpu_reference.attention import MLA_HANDLERS, select_absorbed_mla
    from sglang_overlay.cpu_reference.catalogue import HOOKS, OWN_METHODS
    from sglang_overlay.cpu_reference.executor import CpuExecutor
    from sglang_overlay.hooks.applying import when_imported
    from sglang_overlay.hooks.hook import by_module

    register("cpu", CpuExecutor)
    for module, points in by_module((*HOOKS, *OWN_METHODS)).items():
        when_imported(module, partial(_patch, points), _warn)
    when_imported(MLA_HANDLERS, select_absorbed_mla, _warn)
    when_imported(unasked.ROTARY_EMBEDDING, unasked.avoid_kernels_of_vllm, _warn)


def _patch(points: tuple[Hook, ...], _module: ModuleType) -> None:
    from sglang_overlay.hooks.hook import apply

    mismatch = apply(points)
    if mismatch is not None:
        _warn(mismatch)


def _warn(problem: str) -> None:
    logger.warning("StreamFP8: the CPU reference platform is incomplete, models may fail on it: %s", problem)


def is_wanted() -> bool:
    """Whether the platform is asked for, on a machine that has no accelerator, and SGLang's own CPU engine is not.

    A server that has lost its GPU has to fail, as it does without this package.
    """
    return _is_asked_for() and os.environ.get("SGLANG_USE_CPU_ENGINE", "0") != "1" and not has_accelerator()


def _is_asked_for() -> bool:
    if not any(name.startswith(SETTINGS_PREFIX) for name in os.environ):
        return False
    from sglang_overlay.errors import SettingsError
    from sglang_overlay.settings import load_settings

    try:
        return load_settings(os.environ).cpu_reference
    except SettingsError:
        return False  # The plugin that streams ends the process for it, and says what is wrong.


def has_accelerator() -> bool:
    """Whether torch sees a device SGLang has a platform for (CUDA, ROCm, XPU, NPU, MUSA, MPS)."""
    import torch

    kinds = (getattr(torch, name, None) for name in ("cuda", "xpu", "npu", "musa", "mps"))
    return any(kind is not None and kind.is_available() for kind in kinds)


def _is_current() -> bool:
    from sglang.srt.platforms import current_platform

    from sglang_overlay.cpu_reference.platform import CpuReferencePlatform

    return isinstance(current_platform, CpuReferencePlatform)
