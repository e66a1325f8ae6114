# SPDX-License-Identifier: Apache-2.0
"""Entry point of ``sglang.srt.plugins``. It runs in every process that SGLang starts, so it does almost nothing.

``applying.py`` does the work when SGLang imports the first module that is patched. Only the standard library is
imported here.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

SETTINGS_PREFIX = "SGLANG_STREAMFP8"
REFERENCE_PLATFORM = (f"{SETTINGS_PREFIX}_CPU_REFERENCE", "1")
"""The only setting that has nothing to do with streaming."""
PATCHED_MODULES = frozenset(
    {
        "sglang.srt.eplb.expert_location_updater",
        "sglang.srt.layers.quantization.fp8",
        "sglang.srt.managers.scheduler",
        "sglang.srt.managers.scheduler_components.weight_updater",
        "sglang.srt.managers.scheduler_update_weights_mixin",
        "sglang.srt.model_executor.model_runner",
        "sglang.srt.model_executor.model_runner_components.weight_updater",
        "sglang.srt.model_loader.loader",
        "sglang.srt.models.transformers",
        "sglang.srt.observability.metrics_collector",
        "sglang.srt.ray.engine",
        "sglang.srt.server_args",
    }
)


def activate() -> None:
    """Called by ``load_plugins()`` in every process SGLang starts.

    Raises:
        SystemExit: a setting is invalid. ``load_plugins()`` logs and swallows every ``Exception``, so nothing milder
            would stop the server.
    """
    # If there are any settings, start now, so that ``settings`` reports invalid ones immediately.
    settings = {each for each in os.environ.items() if each[0].startswith(SETTINGS_PREFIX)}
    is_configured = bool(settings - {REFERENCE_PLATFORM})
    if is_configured or any(name in sys.modules for name in PATCHED_MODULES):
        _patch()
    else:
        sys.meta_path.insert(0, FirstImport(PATCHED_MODULES, _patch))


def _patch() -> None:
    from sglang_overlay.hooks import applying

    applying.start()


class FirstImport:
    """A finder that calls ``then`` before the first of ``modules`` is imported, and removes itself."""

    def __init__(self, modules: frozenset[str], then: Callable[[], None]) -> None:
        self._modules = modules
        self._then = then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """See ``importlib.abc.MetaPathFinder``."""
        if name not in self._modules or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        try:
            self._then()
        except Exception:
            # Logged, as in ``load_plugins()``: SGLang's own import must not fail.
            logging.getLogger(__name__).exception("StreamFP8: fp8 loads are stock's.")
        # The import machinery, already past the front of the list, would skip finders that ``then`` has put there.
        found = (finder.find_spec(name, path, target) for finder in list(sys.meta_path))
        return next((spec for spec in found if spec is not None), None)
