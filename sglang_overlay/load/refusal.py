# SPDX-License-Identifier: Apache-2.0
"""What happens to an fp8 load where streaming is not available: one warning, or an error where it is required."""

from __future__ import annotations

import logging

from sglang_overlay.core.errors import sentence
from sglang_overlay.errors import StreamingUnavailableError

logger = logging.getLogger(__name__)

_warned: set[str] = set()


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
    warn_once(f"{sentence(reason)} The model is loaded as in stock SGLang.")


def warn_once(text: str) -> None:
    """Log a warning that this process has not logged before."""
    if text not in _warned:
        _warned.add(text)
        logger.warning("StreamFP8: %s", text)
