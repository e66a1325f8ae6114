# SPDX-License-Identifier: Apache-2.0
"""What a load asks for on the device it goes to, beside the device's name."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from workbench.loads import StartMethod

_SERVER_ARGS: dict[str, dict[str, Any]] = {
    # Of the backends that SGLang has for these, the ones that need no package of kernels but sglang-kernel.
    "cuda": {"attention_backend": "triton", "sampling_backend": "pytorch", "moe_runner_backend": "triton"},
}
_ENVIRON: dict[str, dict[str, str]] = {
    # Nor kernels that are compiled when first used, by FlashInfer where SGLang finds it, or by DeepGEMM.
    "cuda": {"SGLANG_ENABLE_JIT_DEEPGEMM": "0", "SGLANG_IS_FLASHINFER_AVAILABLE": "false"},
}
_START_METHODS: dict[str, StartMethod] = {"cuda": "spawn"}


def server_args(device: str) -> dict[str, Any]:
    """Fields of ``ServerArgs``."""
    return _SERVER_ARGS.get(device, {})


def environ(device: str) -> dict[str, str]:
    """Variables that processes need when they import SGLang."""
    return _ENVIRON.get(device, {})


def start_method(device: str) -> StartMethod:
    """How processes are to be started: CUDA does not survive a fork."""
    return _START_METHODS.get(device, "forkserver")


def prepare(device: str) -> None:
    """What a process has to do before it imports SGLang.

    Where ``flashinfer.norm`` can be imported, sgl-kernel uses its norms, which are compiled on first use from headers
    that are not carried; else it uses its own. SGLang imports ``flashinfer`` itself whatever is chosen.
    """
    if device == "cuda":
        with contextlib.suppress(ImportError):
            importlib.import_module("flashinfer")
            sys.modules["flashinfer.norm"] = None  # type: ignore[assignment]


@dataclass
class Launches:
    """What a device has run: kernels and copies, and the seconds that they took."""

    launches: int = 0
    seconds: float = 0.0


class Accelerator:
    """The memory and the queue of a device; of the CPU, which has neither, nothing happens and all figures are 0."""

    def __init__(self, device: torch.device | str) -> None:
        import torch

        kind = torch.device(device).type
        self._module: Any = None if kind == "cpu" else torch.get_device_module(kind)

    def wait(self) -> None:
        """Until everything that was queued is done."""
        if self._module is not None:
            self._module.synchronize()

    def give_back(self) -> None:
        """Return the memory which the allocator holds and nobody uses."""
        if self._module is not None:
            self._module.empty_cache()

    @property
    def reserved_peak(self) -> int:
        """The most bytes that the allocator has held since its peaks were reset."""
        return 0 if self._module is None else int(self._module.max_memory_reserved())

    def answers(self) -> bool:
        """Whether the device still works: after some errors CUDA refuses everything else."""
        try:
            self.wait()
        except Exception:
            return False
        return True

    @contextlib.contextmanager
    def watched(self) -> Iterator[Launches]:
        """What runs on the device meanwhile, by torch's profiler; complete when the block ends."""
        found = Launches()
        if self._module is None:
            yield found
            return
        from torch import profiler

        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as seen:
            yield found
            self.wait()
        events = [event for event in seen.events() or () if "CUDA" in str(event.device_type)]
        found.launches = len(events)
        found.seconds = sum(event.time_range.elapsed_us() for event in events) / 1e6
