# SPDX-License-Identifier: Apache-2.0
"""What releases before 0.5.13 do on any platform, without asking the one in use."""

from __future__ import annotations

import sys
from importlib import util
from types import ModuleType
from typing import Any

MODULE = "sgl_kernel.kvcacheio"
"""Kernels that copy KV caches to host memory; they are imported everywhere, and called on GPUs."""


def device_name(device_id: int | None = None) -> str:  # noqa: ARG001 (SGLang's signature)
    """In place of ``get_device``, which raises where it finds no accelerator."""
    return "cpu"


def answer_for_kv_transfers() -> None:
    """Have the import of ``MODULE`` succeed where its package is not installed; that of the package still fails."""
    if util.find_spec("sgl_kernel") is None:
        sys.modules.setdefault(MODULE, _Absent(MODULE))


class _Absent(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def transfer(*_args: Any, **_kwargs: Any) -> None:
            raise NotImplementedError(f"the CPU reference platform has no {MODULE}.{name}")

        return transfer
