# SPDX-License-Identifier: Apache-2.0
"""Puts the hooks in place, or sees to it that fp8 loads say why not.

Hooks are applied when SGLang imports the module they belong to: not every process does, and importing those modules
takes seconds.
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from types import ModuleType

from sglang_overlay.errors import SettingsError
from sglang_overlay.schemes import registry
from sglang_overlay.settings import SCHEME_VARIABLE, Mode, Settings, load_settings

logger = logging.getLogger(__name__)

FP8_MODULE = "sglang.srt.layers.quantization.fp8"


def start() -> None:
    """Have SGLang patched as the settings want it.

    Raises:
        SystemExit: a setting is invalid, or streaming is required and cannot be set up.
    """
    try:
        settings = load_settings(os.environ)
        registry.check(settings.schemes)
    except SettingsError as error:
        sys.exit(f"sglang-streamfp8: {error}")
    try:
        _start(settings)
    except Exception as error:
        # Who calls this logs an exception and goes on, with stock's loading.
        if settings.required_by is None:
            raise
        sys.exit(f"sglang-streamfp8: {settings.required_by} is set, and SGLang could not be patched: {error!r}")


def _start(settings: Settings) -> None:
    if settings.mode is Mode.OFF and settings.report_folder is None:
        return
    from sglang_overlay.upstream import built_in, releases

    if built_in.streams_itself():
        _stand_aside(settings)
        return
    reason = releases.unsupported_reason()
    if reason is not None:
        _guard(settings.required_by, reason)
        return
    _patch_when_imported(settings)


def _stand_aside(settings: Settings) -> None:
    from sglang_overlay.upstream import built_in

    if not settings.schemes.is_stock:
        sys.exit(
            f"sglang-streamfp8: {SCHEME_VARIABLE} is set, and {built_in.NOTE}. Unset it, or use SGLang's own release."
        )
    logger.info("StreamFP8: %s.", built_in.NOTE)
    if settings.report_folder is not None:
        logger.warning("StreamFP8: no reports are written: %s.", built_in.NOTE)


def _patch_when_imported(settings: Settings) -> None:
    import wrapt

    from sglang_overlay.upstream import guard, ray_actors
    from sglang_overlay.upstream.catalogue import STREAMING, TELLING
    from sglang_overlay.upstream.touch_point import TouchPoint, apply, apply_fitting, by_module

    def patch(points: tuple[TouchPoint, ...], _module: ModuleType) -> None:
        mismatch = apply(points)
        if mismatch is not None:
            guard.note_mismatch(mismatch)
            _guard(settings.required_by, mismatch)

    def patch_fitting(points: tuple[TouchPoint, ...], _module: ModuleType) -> None:
        apply_fitting(points)

    if settings.mode is not Mode.OFF:
        wrapt.register_post_import_hook(ray_actors.warn_unless_set_up, ray_actors.DRIVER_MODULE)
    for module, points in by_module(STREAMING).items():
        wrapt.register_post_import_hook(partial(patch, points), module)
    for module, points in by_module(TELLING).items():
        wrapt.register_post_import_hook(partial(patch_fitting, points), module)


def _guard(required_by: str | None, reason: str) -> None:
    import wrapt

    def install(module: ModuleType) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        from sglang_overlay.upstream import touch_point
        from sglang_overlay.upstream.guard import ConfigGuard

        if not hasattr(module, "Fp8Config"):
            sys.exit(
                f"sglang-streamfp8: {reason}, and {FP8_MODULE}.Fp8Config is not there to tell fp8 loads from others"
            )
        target = f"{FP8_MODULE}.Fp8Config.__init__"
        HookRegistry.register(target, ConfigGuard(required_by, reason), HookType.AFTER)
        touch_point.apply_registered([target])

    wrapt.register_post_import_hook(install, FP8_MODULE)
