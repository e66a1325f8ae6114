# SPDX-License-Identifier: Apache-2.0
"""Start an SGLang program that does not load plugins by itself, in this process and all it starts with plugins loaded.

``sglang.benchmark.one_batch`` builds a ``ModelRunner`` without ``load_plugins()``, so no plugin is active there.
"""

from __future__ import annotations

import multiprocessing
import runpy
import sys
from collections.abc import Sequence
from importlib import util

from sglang_overlay.errors import StreamFP8Error


class PluginProcess(multiprocessing.Process):
    """A process that loads SGLang's plugins before it does its work, as SGLang's own scheduler process does."""

    def run(self) -> None:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        super().run()


def check_module(module: str) -> None:
    """Make sure that there is a module of that name; imports the packages that it lies in, as running it would.

    Raises:
        StreamFP8Error: there is none. What goes wrong inside of a package that is there is raised as it is.
    """
    try:
        found = util.find_spec(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        found = None
    if found is None:
        raise StreamFP8Error(
            f"there is no module {module!r} for {sys.executable}. Look at its name, and whether its package is "
            "installed for this Python."
        )


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
