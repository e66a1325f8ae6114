# SPDX-License-Identifier: Apache-2.0
"""What tells torch for ROCm from torch for CUDA, as far as SGLang asks.

ROCm's torch keeps the name ``cuda`` for devices, streams and memory, so all else of the stand-in GPU stays as it is.
SGLang asks ``torch.version.hip`` for the platform and ``gcnArchName`` for the architecture.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

import standin.aiter  # noqa: F401 - enters its emulations
from standin import packages
from standin.gpus import Gpu

HIP = "7.2.0"
"""ROCm from which SGLang lets gfx950 run aiter's preshuffled GEMMs for blocks (``fp8_utils.py`` of 0.5.23)."""


def install(gpu: Gpu) -> None:
    """Make torch one for ROCm with this GPU, and let ``aiter`` be imported, as in SGLang's images for ROCm."""
    torch.version.hip = HIP
    torch.version.cuda = None
    # torch 2.11 asks AMD's library for the number of GPUs where it has found NVIDIA's.
    torch.cuda._HAS_PYNVML = False
    of_cuda = torch.cuda.get_device_properties
    torch.cuda.get_device_properties = lambda *args, **kwargs: _Properties(of_cuda(*args, **kwargs), gpu)
    # Nobody compiles: kernels run in the interpreter. SGLang asks for the target's name.
    triton.runtime.driver.set_active(_TritonDriver(gpu))
    packages.answer_for("aiter")


class _Properties:
    """Of CUDA's torch, and what only ROCm's has."""

    def __init__(self, properties: Any, gpu: Gpu) -> None:
        self._properties = properties
        self.gcnArchName = gpu.architecture
        self.warp_size = 64

    def __getattr__(self, name: str) -> Any:
        return getattr(self._properties, name)


class _TritonDriver:
    """What SGLang asks of Triton's driver for HIP."""

    def __init__(self, gpu: Gpu) -> None:
        self._target = GPUTarget("hip", gpu.architecture.partition(":")[0], 64)
        found = {"multiprocessor_count": gpu.multiprocessors, "max_shared_mem": 64 << 10, "warpSize": 64}
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: found)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return torch.cuda.current_device()

    def get_device_interface(self) -> Any:
        return torch.cuda
