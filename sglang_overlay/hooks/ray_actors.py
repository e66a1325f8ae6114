# SPDX-License-Identifier: Apache-2.0
"""``--use-ray``: SGLang's scheduler actors run in Ray's processes, which load no plugins.

Ray's way to run code in each of its workers is the job's ``worker_process_setup_hook``.
"""

from __future__ import annotations

import logging
from types import ModuleType

logger = logging.getLogger(__name__)

DRIVER_MODULE = "sglang.srt.ray.engine"
SETUP_HOOK = "sglang.srt.plugins.load_plugins"


def warn_unless_set_up(_module: ModuleType) -> None:
    """Called in the driver when it imports SGLang's Ray engine."""
    if _setup_hook() != SETUP_HOOK:
        logger.warning(
            "StreamFP8: Ray's scheduler actors load no plugins, so fp8 loads in them are stock's. To stream there, "
            'give the Ray job the runtime environment {"worker_process_setup_hook": "%s"}.',
            SETUP_HOOK,
        )


def _setup_hook() -> str | None:
    import ray

    if not ray.is_initialized():
        return None
    found: str | None = ray.get_runtime_context().runtime_env.get("worker_process_setup_hook")
    return found
