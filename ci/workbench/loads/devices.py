# SPDX-License-Identifier: Apache-2.0
"""Settings that a load needs on a device, besides the device's name."""

from __future__ import annotations

import contextlib
import ctypes
import gc
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
    # SGLang's backends that need no kernel package but sglang-kernel.
    "cuda": {"attention_backend": "triton", "sampling_backend": "pytorch", "moe_runner_backend": "triton"},
}
_ENVIRON: dict[str, dict[str, str]] = {
    # No kernels that FlashInfer, if SGLang finds it, or DeepGEMM compiles on first use.
    "cuda": {"SGLANG_ENABLE_JIT_DEEPGEMM": "0", "SGLANG_IS_FLASHINFER_AVAILABLE": "false"},
}
_FLASHINFER = {
    "flashinfer": ("bmm_fp8",),
    "flashinfer.prefill": ("cudnn_batch_prefill_with_kv_cache",),
    "flashinfer.sampling": ("min_p_sampling_from_probs", "top_k_top_p_sampling_from_probs"),
}
"""Names that SGLang 0.5.17 imports from FlashInfer with CUDA without checking whether it is installed."""
_START_METHODS: dict[str, StartMethod] = {"cuda": "spawn"}


def server_args(device: str) -> dict[str, Any]:
    """Fields of ``ServerArgs``."""
    return _SERVER_ARGS.get(device, {})


def environ(device: str) -> dict[str, str]:
    """Environment variables that processes need when they import SGLang."""
    return _ENVIRON.get(device, {})


def start_method(device: str) -> StartMethod:
    """How to start processes: CUDA does not survive a fork."""
    return _START_METHODS.get(device, "forkserver")


def prepare(device: str) -> None:
    """Provide a substitute for FlashInfer if it is not installed; to be called before SGLang is imported.

    With CUDA, SGLang 0.5.17 imports some of its names for any choice of backends, and decodes DeepSeek with one. SGLang
    and sgl-kernel have their own kernels for everything else that the check needs.
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
    """Write ``a @ b`` of fp8 matrices ``[n, rows, k]`` and ``[n, k, columns]`` with one scale each to ``out``."""
    import torch

    torch.bmm(a.to(dtype), b.to(dtype), out=out)
    out.mul_(a_scale * b_scale)


def release_host_memory() -> None:
    """Collect garbage and release malloc's free memory, so that the next reading shows only memory in use."""
    gc.collect()
    # Only glibc keeps any.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@dataclass
class Launches:
    """Number of kernels and copies that a device has run, and the seconds they took."""

    launches: int = 0
    seconds: float = 0.0


class Accelerator:
    """The memory and the queue of a device. On the CPU nothing happens, and all figures are 0."""

    def __init__(self, device: torch.device | str) -> None:
        import torch

        kind = torch.device(device).type
        self._module: Any = None if kind == "cpu" else torch.get_device_module(kind)

    def wait(self) -> None:
        """Wait until all queued work is done."""
        if self._module is not None:
            self._module.synchronize()

    def release_memory(self) -> None:
        """Release unused memory that the allocator holds."""
        if self._module is not None:
            self._module.empty_cache()

    @property
    def reserved_peak(self) -> int:
        """The most bytes that the allocator has held since its peaks were reset."""
        return 0 if self._module is None else int(self._module.max_memory_reserved())

    def answers(self) -> bool:
        """Whether the device still works: after some errors CUDA refuses all further work."""
        try:
            self.wait()
        except Exception:
            return False
        return True

    @contextlib.contextmanager
    def watched(self) -> Iterator[Launches]:
        """Counts what runs on the device inside the block, with torch's profiler; complete when the block ends."""
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
