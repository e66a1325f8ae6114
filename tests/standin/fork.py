# SPDX-License-Identifier: Apache-2.0
"""Processes with stand-in GPUs, forked from one that has imported what SGLang imports, but not SGLang.

A process has its GPU before it imports SGLang, so Python's one fork server, which has SGLang imported, cannot be had.
This is a second one: a new interpreter takes five times as long.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from harness.forked_python import import_all, imported_names
from workbench.loads.job import changed_environ

from sglang_overlay.offline.plan.replacing import replaced

PREPARE = "standin.process:install"
"""What a process does first, with the variables of its GPU."""

_NAMES = "STANDIN_IMPORTS"


class _Process(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: BaseProcess) -> Any:
        from multiprocessing.popen_forkserver import Popen

        server = _server(os.environ["LD_PRELOAD"])
        with replaced(forkserver, "connect_to_new_process", server.connect_to_new_process):
            return Popen(process_obj)


class Context(ForkServerContext):
    """As ``multiprocessing.get_context("forkserver")``, with the other fork server."""

    Process = _Process

    def __init__(self) -> None:
        super().__init__()
        # Now, since processes are started with the variables of a GPU, and this starts Python's own fork server.
        _names()


@cache
def _server(_preloaded: str) -> forkserver.ForkServer:
    """The one for these libraries, which a process has from its start."""
    server = forkserver.ForkServer()
    server.set_forkserver_preload([__name__])
    paths = os.pathsep.join(filter(None, sys.path))
    with changed_environ({"STANDIN_GPU": None, _NAMES: str(_names()), "PYTHONPATH": paths}):
        server.ensure_running()
    return server


@cache
def _names() -> Path:
    return imported_names(Path(tempfile.mkdtemp(prefix="standin-")))


if _NAMES in os.environ and "STANDIN_GPU" not in os.environ:
    # In the fork server. torch does not use CUDA in a process whose parent has asked it for devices.
    with replaced(torch.cuda, "is_available", lambda: False), replaced(torch.cuda, "device_count", lambda: 0):
        import_all(Path(os.environ[_NAMES]))
