# SPDX-License-Identifier: Apache-2.0
"""Make fp8 loads check that the hooks are in place, and report it if they are not."""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import Any

from sglang_overlay.errors import StreamingUnavailableError
from sglang_overlay.load.refusal import refuse, warn_once
from sglang_overlay.settings import MODE_VARIABLE, Mode, Settings

FP8_MODULE = "sglang.srt.layers.quantization.fp8"

logger = logging.getLogger(__name__)

_mismatches: list[str] = []


def note_mismatch(reason: str) -> None:
    """Note that a module's hooks could not be put in place. Other modules' may be, so loads must check ``mismatch``."""
    _mismatches.append(reason)


def mismatch() -> str | None:
    """Why no load of this process can be streamed although some hooks are in place; None if loads can be."""
    if _mismatches:
        return _mismatches[0]
    from sglang_overlay.hooks.catalogue import STREAMING
    from sglang_overlay.hooks.hook import displaced

    lost = displaced(STREAMING)
    return f"another plugin has replaced {', '.join(lost)}, and with it the hook there" if lost else None


def look_at_hooks(settings: Settings) -> None:
    """At the beginning of an fp8 load, report hooks that are not in place and hooked functions that are untested.

    Untested functions are hooked all the same, with one warning on one rank.

    Raises:
        StreamingUnavailableError: streaming is required, but not possible or untested.
    """
    from sglang_overlay.hooks import compatibility
    from sglang_overlay.load.ranks import parallel_ranks

    if settings.mode is Mode.OFF:
        return
    reason = mismatch()
    if reason is not None:
        refuse(settings.required_by, reason)
        return
    note = compatibility.untested_note()
    if note is None:
        return
    required = f"{MODE_VARIABLE}={Mode.REQUIRE.value}"
    if settings.mode is Mode.REQUIRE:
        raise StreamingUnavailableError(f"{required}, but {note} {MODE_VARIABLE}={Mode.ON.value} streams all the same.")
    if parallel_ranks().is_first:
        warn_once(f"{note} This fp8 load is streamed; {required} would refuse it.")


def watch(required_by: str | None, reason: str, module: ModuleType) -> None:
    """Make fp8 loads, and no others, say that they are not streamed. If called again, the first reason stays.

    Args:
        required_by: as for ``refusal.refuse``.
        reason: as for ``refusal.refuse``.
        module: SGLang's ``fp8``.
    """
    import wrapt

    config = getattr(module, "Fp8Config", None)
    if config is None:
        told = f"{reason}, and {FP8_MODULE}.Fp8Config is not there to tell fp8 loads from others"
        if required_by is not None:
            sys.exit(f"sglang-streamfp8: {required_by}, but {told}")
        logger.warning("StreamFP8: %s.", told)
        return
    if isinstance(vars(config).get("__init__"), wrapt.FunctionWrapper):
        return

    def say(original: Any, made: Any, args: Any, kwargs: Any) -> None:
        original(*args, **kwargs)
        if type(made) is config and not made.is_checkpoint_fp8_serialized:
            refuse(required_by, reason)

    wrapt.wrap_function_wrapper(module, "Fp8Config.__init__", say)
