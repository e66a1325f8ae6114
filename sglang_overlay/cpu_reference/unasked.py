# SPDX-License-Identifier: Apache-2.0
"""What early releases do on any platform, without asking the one in use."""

from __future__ import annotations

import sys
from importlib import util
from types import ModuleType
from typing import Any

PACKAGES = {"sgl_kernel.kvcacheio": "sgl_kernel", "sglang.jit_kernel.dsa.cutedsl_paged_mqa_logits": "cutlass"}
"""Modules of kernels that are imported everywhere and called on GPUs, and the packages that they need.

They copy KV caches to host memory (until 0.5.12.post1), and run DeepSeek's sparse attention (0.5.15).
"""
ROTARY_EMBEDDING = "sglang.srt.layers.rotary_embedding.base"


def avoid_kernels_of_vllm(module: ModuleType) -> None:
    """Have ``RotaryEmbedding`` run in torch, as on SGLang's own CPUs, where it does not ask the platform.

    It takes any platform that it does not know for one with vLLM's kernels.
    """
    if not hasattr(module, "current_platform"):
        vars(module)["_is_cpu"] = True


def device_name(device_id: int | None = None) -> str:  # noqa: ARG001 (SGLang's signature)
    """In place of ``get_device``, which raises where it finds no accelerator."""
    return "cpu"


def answer_for_kernels() -> None:
    """Have imports of ``PACKAGES`` succeed where the package is not installed; that of the package still fails."""
    for module, package in PACKAGES.items():
        if util.find_spec(package) is None:
            sys.modules.setdefault(module, _Absent(module))


class _Absent(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def transfer(*_args: Any, **_kwargs: Any) -> None:
            raise NotImplementedError(f"the CPU reference platform has no {self.__name__}.{name}")

        return transfer
