# SPDX-License-Identifier: Apache-2.0
"""What happens to an fp8 load that cannot be streamed: one warning, or an error if streaming is required."""

from __future__ import annotations

import logging

from sglang_overlay.core.messages import sentence
from sglang_overlay.errors import StreamingUnavailableError

logger = logging.getLogger(__name__)

_warned: set[str] = set()


def refuse(required_by: str | None, reason: str) -> None:
    """Warn, once per process and reason, that an fp8 load is not streamed.

    Args:
        required_by: the setting that requires streaming, if any.
        reason: why the load is not streamed.

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
