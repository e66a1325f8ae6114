# SPDX-License-Identifier: Apache-2.0
"""Start an SGLang program with plugins loaded in this process and in all that it starts with ``multiprocessing``.

SGLang itself does not load them in ``sglang.benchmark.one_batch``, and in all but the first process of an encoder
server (``disaggregation/encoder/runtime.py``).
"""

from __future__ import annotations

import multiprocessing
import runpy
import sys
from collections.abc import Sequence
from importlib import util
from multiprocessing.context import SpawnContext, SpawnProcess

from sglang_overlay.errors import StreamFP8Error


class PluginProcess(multiprocessing.Process):
    """A process that loads SGLang's plugins before its work, as SGLang's scheduler process does."""

    def run(self) -> None:
        load_plugins_everywhere()
        super().run()


class PluginSpawnProcess(SpawnProcess):
    """The same for processes that are explicitly spawned."""

    def run(self) -> None:
        load_plugins_everywhere()
        super().run()


def load_plugins_everywhere() -> None:
    """Load SGLang's plugins in this process and in each process that it starts."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    # SGLang creates processes by these names; a spawned one imports the class from this module.
    multiprocessing.Process = PluginProcess  # type: ignore[misc]
    SpawnContext.Process = PluginSpawnProcess


def check_module(module: str) -> None:
    """Make sure that a module exists; imports its parent packages, as running it would.

    Raises:
        StreamFP8Error: there is no such module. Errors inside existing packages are raised unchanged.
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
    load_plugins_everywhere()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
