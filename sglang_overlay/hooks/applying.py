# SPDX-License-Identifier: Apache-2.0
"""Put the hooks in place, or make fp8 loads say why not.

Hooks are applied when SGLang imports the module they belong to, since importing it takes seconds and not every process
needs it.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

from sglang_overlay.errors import SettingsError
from sglang_overlay.schemes import registry
from sglang_overlay.settings import Mode, Settings, load_settings

logger = logging.getLogger(__name__)


def start() -> None:
    """Patch SGLang according to the settings.

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
        # The caller logs exceptions and continues, so loads would silently be stock's.
        if settings.required_by is None:
            raise
        sys.exit(f"sglang-streamfp8: {settings.required_by} is set, and SGLang could not be patched: {error!r}")


def _start(settings: Settings) -> None:
    if settings.mode is Mode.OFF and settings.report_folder is None:
        return
    from sglang_overlay.hooks import built_in, compatibility

    if built_in.streams_itself():
        logger.info("StreamFP8: %s.", built_in.NOTE)
    reason = compatibility.unsupported_reason()
    if reason is not None:
        _guard(settings.required_by, reason)
        return
    _patch_when_imported(settings)


def _patch_when_imported(settings: Settings) -> None:
    from sglang_overlay.hooks import option_hooks, ray_actors
    from sglang_overlay.hooks.catalogue import MEASURING, OPTIONS, SERIES, STREAMING, TELLING
    from sglang_overlay.hooks.hook import Hook, apply, apply_fitting, by_module

    def patch(hooks: tuple[Hook, ...], _module: ModuleType) -> None:
        mismatch = apply(hooks)
        if mismatch is not None:
            note_mismatch(mismatch)

    def note_mismatch(reason: str) -> None:
        from sglang_overlay.hooks import guard

        guard.note_mismatch(reason)
        _guard(settings.required_by, reason)

    def patch_fitting(hooks: tuple[Hook, ...], _module: ModuleType) -> None:
        apply_fitting(hooks)

    is_off = settings.mode is Mode.OFF
    for module, hooks in by_module(MEASURING if is_off else (*SERIES, *STREAMING)).items():
        when_imported(module, partial(patch, hooks), note_mismatch)
    for module, hooks in by_module(TELLING if is_off else (*OPTIONS, *TELLING)).items():
        when_imported(module, partial(patch_fitting, hooks), _log)
    if not is_off:
        when_imported(option_hooks.ARGUMENTS_MODULE, option_hooks.add_choices, _log)
        when_imported(ray_actors.DRIVER_MODULE, ray_actors.warn_unless_set_up, _log)


def when_imported(module: str, act: Callable[[ModuleType], None], say: Callable[[str], None]) -> None:
    """Call ``act`` when a module has been imported, or now if it has been. Its errors never break the import.

    Args:
        module: the module's name.
        act: gets the module.
        say: gets a message if ``act`` fails.
    """
    import wrapt

    def safely(imported: ModuleType) -> None:
        try:
            act(imported)
        except Exception as error:
            logger.debug("StreamFP8: hooks of %s", module, exc_info=True)
            say(f"hooks of {module} could not be put in place ({type(error).__name__}: {error})")

    wrapt.register_post_import_hook(safely, module)


def _log(problem: str) -> None:
    logger.warning("StreamFP8: %s.", problem)


def _guard(required_by: str | None, reason: str) -> None:
    from sglang_overlay.hooks import guard

    when_imported(guard.FP8_MODULE, partial(guard.watch, required_by, reason), _log)
