# SPDX-License-Identifier: Apache-2.0
"""The out-of-tree platform: what SGLang asks of a device, answered for a plain CPU."""

from __future__ import annotations

import inspect
import os
import platform as host
from typing import Any

import psutil
import torch
from sglang.srt.platforms import interface
from sglang.srt.platforms.device_mixin import DeviceCapability, PlatformEnum

from sglang_overlay.cpu_reference import kernels, kv_pools

#: Tokens the KV pool holds unless ``--max-total-tokens`` says otherwise. SGLang sizes the pool to fill the device; here
#: the device is the host's memory, which the pool would not only reserve but touch.
KV_POOL_TOKENS = 16384
#: Concurrent requests unless ``--max-running-requests`` says otherwise: attention runs one sequence at a time.
RUNNING_REQUESTS = 16
#: The MoE runner with which SGLang's model code keeps experts as they are in the checkpoint.
MXFP8_EXPERTS = "triton"
CORES_PER_RANK = "SGLANG_CPU_OMP_THREADS_BIND"


class CpuReferencePlatform(interface.SRTPlatform):  # type: ignore[misc]
    """A plain CPU. ``is_cpu()`` stays False: for SGLang that means its own AMX engine and its kernels."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    if hasattr(interface, "PlatformCapabilities"):  # Before, a method for each, and none of them the default too.
        capabilities = interface.PlatformCapabilities()
    _cores_bound: str | None = None

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: torch.device | None = None) -> float:
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_available_memory(self, device_id: int = 0) -> tuple[int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total

    def is_pin_memory_available(self, device: torch.device | None = None) -> bool:
        return False

    def get_device(self, device_id: int = 0) -> torch.device:
        return torch.device("cpu")

    def set_device(self, device: torch.device) -> None:
        pass

    def get_device_name(self, device_id: int = 0) -> str:
        return f"cpu ({host.machine()})"

    def get_device_uuid(self, device_id: int = 0) -> str:
        return host.machine()

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability | None:
        return None

    def get_torch_distributed_backend_str(self) -> str:
        return "gloo"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> type:
        return kv_pools.heads()

    def get_mla_kv_pool_cls(self) -> type:
        return kv_pools.latent()

    def get_paged_allocator_cls(self) -> type | None:
        # Where SGLang asks for pools in one call (since 0.5.22), None has it take its own of everything.
        return None if hasattr(interface.SRTPlatform, "get_kv_pool_cls") else kv_pools.slots()

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Defaults of ``sglang.srt.server_args.ServerArgs`` for this platform; what the user set stays."""
        for name, value in (
            ("attention_backend", "torch_native"),
            ("sampling_backend", "pytorch"),
            ("max_total_tokens", KV_POOL_TOKENS),
            ("max_running_requests", RUNNING_REQUESTS),
        ):
            if getattr(server_args, name) is None:
                setattr(server_args, name, value)
        if server_args.quantization == "mxfp8" and server_args.moe_runner_backend == "auto":
            _take_plain_mxfp8_experts(server_args)
        server_args.disable_overlap_schedule = True
        self._bind_cores(server_args.tp_size * (server_args.pp_size * server_args.dp_size if all_ranks_bound() else 1))

    def init_backend(self) -> None:
        """Give this rank its share of the cores, and compile; SGLang calls it once in each worker."""
        ranks = os.environ.get(CORES_PER_RANK, "all").count("|") + 1
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
        kernels.prepare()

    def _bind_cores(self, ranks: int) -> None:
        # The value set for an earlier engine of this process is not the user's choice: ranks may differ.
        if os.environ.get(CORES_PER_RANK) in (None, self._cores_bound):
            self._cores_bound = os.environ[CORES_PER_RANK] = _cores_of_ranks(ranks)


def _take_plain_mxfp8_experts(server_args: Any) -> None:
    """Keep SGLang from its default for MXFP8, FlashInfer's kernels: for those gate and up are swapped on loading."""
    from sglang.srt import server_args as arguments

    add_choices = getattr(arguments, "add_mxfp8_moe_runner_backend_choices", None)
    if add_choices is not None:  # Since 0.5.17; there is no other way to say it.
        add_choices({MXFP8_EXPERTS}.difference(arguments.MXFP8_MOE_RUNNER_BACKEND_CHOICES))
        server_args.moe_runner_backend = MXFP8_EXPERTS


def all_ranks_bound() -> bool:
    """Whether SGLang wants cores for each rank (since 0.5.19), and not only for those of tensor parallelism."""
    from sglang.srt.utils import numa_utils

    binding = getattr(numa_utils, "init_threads_binding", None)
    return binding is not None and "world_size" in inspect.signature(binding).parameters


def _cores_of_ranks(ranks: int) -> str:
    """Cores of each rank in SGLang's notation, ranks separated by ``|``; SGLang refuses more ranks than NUMA nodes
    without one. Ranks share cores where there are fewer cores than ranks."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    groups = ([cores[(rank * share + index) % len(cores)] for index in range(share)] for rank in range(ranks))
    return "|".join(",".join(map(str, group)) for group in groups)
