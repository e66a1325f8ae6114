# SPDX-License-Identifier: Apache-2.0
"""Start an SGLang program that does not load plugins by itself, in this process and all it starts with plugins loaded.

``sglang.benchmark.one_batch`` builds a ``ModelRunner`` without ``load_plugins()``, so no plugin is active there.
"""

from __future__ import annotations

import multiprocessing
import runpy
import sys
from collections.abc import Sequence


class PluginProcess(multiprocessing.Process):
    """A process that loads SGLang's plugins before it does its work, as SGLang's own scheduler process does."""

    def run(self) -> None:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        super().run()


def run(module: str, arguments: Sequence[str]) -> None:
    """Do what ``python -m module arguments`` does, with SGLang's plugins loaded.

    Raises:
        ImportError: there is no such module.
    """
    from sglang.srt.plugins import load_plugins

    load_plugins()
    # The program asks for processes by this name; a spawned one finds the class where it is defined, here.
    multiprocessing.Process = PluginProcess  # type: ignore[misc]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
