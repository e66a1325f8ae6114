# SPDX-License-Identifier: Apache-2.0
"""What a load asks for on the device it goes to, beside the device's name."""

from __future__ import annotations

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
