# SPDX-License-Identifier: Apache-2.0
"""What a load asks for on the device it goes to, beside the device's name."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from workbench.loads.job import StartMethod

_SERVER_ARGS: dict[str, dict[str, Any]] = {
    # Of the backends that SGLang has for these, the ones that need no package of kernels but sglang-kernel.
    "cuda": {"attention_backend": "triton", "sampling_backend": "pytorch", "moe_runner_backend": "triton"},
}
_ENVIRON: dict[str, dict[str, str]] = {
    # Nor kernels that are compiled when first used, by FlashInfer where SGLang finds it, or by DeepGEMM.
    "cuda": {"SGLANG_ENABLE_JIT_DEEPGEMM": "0", "SGLANG_IS_FLASHINFER_AVAILABLE": "false"},
}
_FLASHINFER = {
    "flashinfer": ("bmm_fp8",),
    "flashinfer.prefill": ("cudnn_batch_prefill_with_kv_cache",),
    "flashinfer.sampling": ("min_p_sampling_from_probs", "top_k_top_p_sampling_from_probs"),
}
"""What SGLang 0.5.17 imports of FlashInfer with CUDA without asking whether it is there."""
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
    """What a process has to do before it imports SGLang, where FlashInfer is not installed.

    SGLang 0.5.17 imports some names of it with CUDA whatever backends are chosen, and decodes DeepSeek with one. SGLang
    and sgl-kernel have kernels of their own for all else that the check needs.
    """
    if device == "cuda" and importlib.util.find_spec("flashinfer") is None:
        for module, names in _FLASHINFER.items():
            made: Any = types.ModuleType(module)
            made.__spec__ = importlib.machinery.ModuleSpec(module, None)
            made.__dict__.update(dict.fromkeys(names))
            sys.modules[module] = made
        sys.modules["flashinfer"].__dict__["bmm_fp8"] = bmm_fp8


def bmm_fp8(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    dtype: torch.dtype,
    out: torch.Tensor,
) -> None:
    """``a @ b`` of fp8 matrices ``[n, rows, k]`` and ``[n, k, columns]`` with one scale each, written to ``out``."""
    import torch

    torch.bmm(a.to(dtype), b.to(dtype), out=out)
    out.mul_(a_scale * b_scale)


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

    def release_memory(self) -> None:
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
