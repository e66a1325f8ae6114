# SPDX-License-Identifier: Apache-2.0
"""How a device does the work of a load: with which quantizers, in which threads, and how values are uploaded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from sglang_overlay.core.quantizers import UnitQuantizer


class Executor:
    """Runs every job immediately in the calling thread: GPU kernels run asynchronously to the loader anyway.

    The only seam for platforms that need something else (``register``). Thread-safe.

    Attributes:
        quantizes_late: whether ``quantizer`` replaces stock's also for layers whose bf16 weights upstream reads after
            loading.
        uploads: whether each piece of a unit goes through ``to_device``; otherwise a quantizer copies pieces into the
            unit.
    """

    quantizes_late = False
    uploads = False

    def quantizer(self, quantizer: UnitQuantizer) -> UnitQuantizer:
        """The quantizer to use in place of a layer plan's ``quantizer``."""
        return quantizer

    def takes(self, size: int) -> bool:
        """Whether to ``submit`` a job that reads ``size`` bytes; otherwise the caller runs it."""
        return False

    def submit(self, job: Callable[[], Any]) -> None:
        """Run ``job``, possibly later in another thread; then ``check`` raises its error."""
        job()

    def check(self) -> None:
        """Raise the error of a failed job, once. Only after ``close`` are all jobs accounted for."""

    def to_device(self, values: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """``values`` on ``device``, in ``dtype``."""
        return values.to(device=device, dtype=dtype)

    def reading(self) -> AbstractContextManager[object]:
        """Context for reading the checkpoint and running upstream's loaders. Once it ends, all jobs are done."""
        return nullcontext()

    def close(self) -> None:
        """Wait for all jobs and release threads and memory. May be called more than once."""


def register(device_type: str, factory: Callable[[], Executor]) -> None:
    """Make ``executor_for`` use ``factory`` for devices of this type."""
    _factories[device_type] = factory


def executor_for(device: torch.device) -> Executor:
    """A new executor for ``device``."""
    return _factories.get(device.type, Executor)()


_factories: dict[str, Callable[[], Executor]] = {}
"""By device type. Written when a process starts, before any load."""
