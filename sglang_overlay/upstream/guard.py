# SPDX-License-Identifier: Apache-2.0
"""What happens to an fp8 load where streaming is not available: one warning, or an error where it is required."""

from __future__ import annotations

import logging
from typing import Any

from sglang_overlay.core.errors import sentence
from sglang_overlay.errors import StreamingUnavailableError

logger = logging.getLogger(__name__)

_warned: set[str] = set()
_mismatches: list[str] = []


def note_mismatch(reason: str) -> None:
    """Hooks of a module could not be applied. Those of others may have been: loads are to ask ``mismatch``."""
    _mismatches.append(reason)


def mismatch() -> str | None:
    """Why no load of this process can be streamed, though some hooks are in place."""
    return _mismatches[0] if _mismatches else None


def refuse(required_by: str | None, reason: str) -> None:
    """Say, once a process, that an fp8 load is not streamed.

    Args:
        required_by: the setting under which that is an error.
        reason: why it is not.

    Raises:
        StreamingUnavailableError: streaming is required.
    """
    if required_by is not None:
        raise StreamingUnavailableError(f"{required_by}, but this fp8 load cannot be streamed: {sentence(reason)}")
    if reason not in _warned:
        _warned.add(reason)
        logger.warning("StreamFP8: %s The model is loaded as in stock SGLang.", sentence(reason))


class ConfigGuard:
    """Hook after ``Fp8Config.__init__`` for releases that cannot be streamed: only fp8 loads get to hear of it."""

    def __init__(self, required_by: str | None, reason: str) -> None:
        self._required_by = required_by
        self._reason = reason
        self.__name__ = "sglang_streamfp8_guard"

    def __call__(self, _result: None, config: Any, *_args: Any, **_kwargs: Any) -> None:
        from sglang.srt.layers.quantization.fp8 import Fp8Config

        if type(config) is Fp8Config and not config.is_checkpoint_fp8_serialized:
            refuse(self._required_by, self._reason)
