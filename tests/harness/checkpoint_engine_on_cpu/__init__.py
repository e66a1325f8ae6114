# SPDX-License-Identifier: Apache-2.0
"""Moonshot's checkpoint-engine where there is no device: it knows GPUs and NPUs only. Importing this is enough.

A server imports it as ``SGLANG_EXTERNAL_MODEL_PACKAGE``. The trainer's buffer, of which a GPU's trainer sends a CUDA
IPC handle, lies in shared memory.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from checkpoint_engine import device_utils

_ROOM = 1 << 30


def rebuilt(manager: bytes, name: bytes, size: int, *_: object) -> torch.Tensor:
    """The trainer's buffer, in a worker."""
    storage = torch.UntypedStorage._new_shared_filename_cpu(manager, name, size)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def reduced(buffer: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
    """A handle of as many parts as CUDA's, of which a worker replaces the device."""
    buffer.share_memory_()
    manager, name, size = buffer.untyped_storage()._share_filename_cpu_()
    return rebuilt, (manager, name, size, None, None, None, "cpu", None)


def for_a_trainer() -> None:
    """Have ``ParameterServer`` pin nothing, and share its buffer."""
    from checkpoint_engine import ps
    from sglang.srt.platforms import current_platform

    ps.reduce_tensor = reduced
    ps._get_physical_gpu_id = lambda *_: f"GPU-{current_platform.get_device_uuid()}"
    torch.empty = functools.partial(_unpinned, torch.empty)


def _unpinned(empty: Any, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
    made: torch.Tensor = empty(*args, **kwargs)
    return made


def _nothing(*_: object) -> int:
    return 0


_CPU = SimpleNamespace(
    device_count=lambda: 1,
    mem_get_info=lambda: (_ROOM, _ROOM),
    **dict.fromkeys(
        ("set_device", "synchronize", "empty_cache", "ipc_collect", "memory_allocated", "memory_reserved"), _nothing
    ),
)


def _found(manager: Any) -> None:
    manager.device_type, manager.device_module = "cpu", _CPU


device_utils.DeviceManager.__init__ = _found
device_utils.DeviceManager.backend = "gloo"
