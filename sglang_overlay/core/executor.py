# SPDX-License-Identifier: Apache-2.0
"""How the work of a load is done on a device: which quantizers, in which thread, and how values get there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from sglang_overlay.core.quantizers import UnitQuantizer


class Executor:
    """Does everything at once, in the thread that asks: a GPU computes beside the loader by itself.

    The one seam for what a platform does otherwise (``register``). Any thread may call.

    Attributes:
        quantizes_late: layers whose bf16 weights upstream reads after loading are quantized by ``quantizer`` as well,
            in place of stock's.
        uploads: pieces of a unit go through ``to_device`` one by one; otherwise a quantizer copies them into the unit.
    """

    quantizes_late = False
    uploads = False

    def prepare(self) -> None:
        """A layer is about to be created. Called for each."""

    def quantizer(self, quantizer: UnitQuantizer) -> UnitQuantizer:
        """What to use in place of a layer plan's ``quantizer``."""
        return quantizer

    def takes(self, size: int) -> bool:
        """Whether a job that reads ``size`` bytes is to be submitted; else the caller runs it."""
        return False

    def submit(self, job: Callable[[], Any]) -> None:
        """Run ``job``, perhaps later; ``check`` raises what it raises."""
        job()

    def check(self) -> None:
        """Raise what a job has raised, once. Certain to know of a job only after ``close``."""

    def to_device(self, values: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """``values`` on ``device``, in ``dtype``."""
        return values.to(device=device, dtype=dtype)

    def reading(self) -> AbstractContextManager[object]:
        """Around reading the checkpoint, and upstream's loaders."""
        return nullcontext()

    def close(self) -> None:
        """Wait for all jobs and let go of threads and memory. May be called again."""


class ExecutorFactory(Protocol):
    """Makes executors of a platform."""

    def __call__(self, *, threads: bool) -> Executor:
        """Args: ``threads``, whether jobs may run beside the loader."""


def register(device_type: str, factory: ExecutorFactory) -> None:
    """Have ``executor_for`` make a platform's executors for devices of this type."""
    _factories[device_type] = factory


def executor_for(device: torch.device, *, threads: bool = True) -> Executor:
    """A new executor for ``device``."""
    factory = _factories.get(device.type)
    return Executor() if factory is None else factory(threads=threads)


_factories: dict[str, ExecutorFactory] = {}
"""Of platforms, by type of device. Written when a process starts, before any load."""
