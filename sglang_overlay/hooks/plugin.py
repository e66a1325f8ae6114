# SPDX-License-Identifier: Apache-2.0
"""Entry point of ``sglang.srt.plugins``. Every process that SGLang starts pays for it, so it does next to nothing.

The work is in ``applying.py``, and waits until SGLang imports the first module that is patched. Only the standard
library is imported here.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

SETTINGS_PREFIX = "SGLANG_STREAMFP8"
REFERENCE_PLATFORM = (f"{SETTINGS_PREFIX}_CPU_REFERENCE", "1")
"""The one setting that streaming has nothing to do with."""
PATCHED_MODULES = frozenset(
    {
        "sglang.srt.layers.quantization.fp8",
        "sglang.srt.managers.scheduler",
        "sglang.srt.managers.scheduler_components.weight_updater",
        "sglang.srt.model_executor.model_runner",
        "sglang.srt.model_executor.model_runner_components.weight_updater",
        "sglang.srt.model_loader.loader",
        "sglang.srt.observability.metrics_collector",
        "sglang.srt.ray.engine",
    }
)


def activate() -> None:
    """Called by ``load_plugins()`` in every process SGLang starts.

    Raises:
        SystemExit: a setting is invalid. ``load_plugins()`` logs and swallows every ``Exception``, so nothing milder
            would stop the server.
    """
    # Their values are for ``settings`` to read; where there are any, what is wrong with them has to be said at once.
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
    """A finder that finds nothing: it calls ``then`` before the first of ``modules`` is imported, and is gone."""

    def __init__(self, modules: frozenset[str], then: Callable[[], None]) -> None:
        self._modules = modules
        self._then = then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """As of ``importlib.abc.MetaPathFinder``."""
        if name not in self._modules or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        try:
            self._then()
        except Exception:
            # As ``load_plugins()`` does: SGLang's own import must not fail.
            logging.getLogger(__name__).exception("StreamFP8: fp8 loads are stock's.")
        # What ``then`` has put before the other finders is passed over where the import machinery is by now.
        found = (finder.find_spec(name, path, target) for finder in list(sys.meta_path))
        return next((spec for spec in found if spec is not None), None)
