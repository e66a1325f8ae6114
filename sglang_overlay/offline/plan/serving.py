# SPDX-License-Identifier: Apache-2.0
"""How much can be served once a model is loaded, by SGLang's own code that sizes its memory pools.

What cannot be planned is data (``before_loading`` in ``gpus.json``): the CUDA context and NCCL's buffers. The rest is
SGLang's: the share of the GPU that it leaves to activations and CUDA graphs (``arg_groups/memory_hook.py``), what a
token and a request take (``model_executor/pool_configurator.py``), and the limits on both
(``mem_cache/kv_cache_configurator.py``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from sglang_overlay.offline.plan.gpus import GPU
from sglang_overlay.offline.plan.job import Serving
from sglang_overlay.offline.plan.replacing import replaced

if TYPE_CHECKING:
    from sglang_overlay.offline.simulation import SimulatedRank

_ON_A_GPU: Mapping[str, Any] = {
    "device": "cuda",
    # Which one a GPU would get is decided by its driver; this one leaves everything else as it is.
    "attention_backend": "triton",
    "cuda_graph_backend_decode": None,
    "cuda_graph_backend_prefill": None,
}

_ON_A_CPU: Mapping[str, Any] = {
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "disable_overlap_schedule": True,
}
"""Defaults of the platform that SGLang takes here, but for its limits."""

_NO_EXPERTS = "SGLang's Triton kernels of fp8 experts need compute capability 8.9"


def serving(rank: SimulatedRank, model: torch.nn.Module, weights: int, gpus: Iterable[GPU]) -> tuple[Serving, ...]:
    """What ``rank`` can serve with a GPU of its own, for each of ``gpus``.

    Args:
        rank: of a server; valid now. Its published arguments are not the same afterwards.
        model: loaded without memory.
        weights: bytes of the model.
        gpus: kinds of GPUs.
    """
    runner = None
    found = []
    experts = any(layer.w13_weight.dtype is torch.float8_e4m3fn for layer in model.modules() if _has_experts(layer))
    for gpu in gpus:
        fraction = _mem_fraction_static(rank, gpu)
        context = rank.model_config.context_len
        if experts and not gpu.serves_experts:
            found.append(Serving(gpu.name, fraction, 0, 0, context, _NO_EXPERTS))
            continue
        with _without_limits_of_the_reference():
            arguments = rank.publish(**_ON_A_CPU, mem_fraction_static=fraction)
        runner = runner or runner_of(model, rank.model_config, arguments)
        free = gpu.memory - (gpu.taken_alone if rank.layout.ranks == 1 else gpu.taken_among_ranks)
        try:
            pools = pool_sizes(runner, free / 2**30, (free - weights) / 2**30)
        except (RuntimeError, ValueError) as error:
            why = f"no room for a KV cache at --mem-fraction-static {fraction:g}: {error}"
            found.append(Serving(gpu.name, fraction, 0, 0, context, why))
        else:
            found.append(Serving(gpu.name, fraction, pools.max_total_num_tokens, pools.max_running_requests, context))
    return tuple(found)


def _has_experts(layer: torch.nn.Module) -> bool:
    return isinstance(getattr(layer, "w13_weight", None), torch.Tensor)


def runner_of(model: torch.nn.Module, model_config: Any, arguments: Any) -> Any:
    """SGLang's ``ModelRunner`` with a model that has been loaded already, for the published arguments."""
    from sglang.srt.model_executor import model_runner

    loaded = SimpleNamespace(model=model, loader=None, startup_weight_load=None, remote_instance_weight_info=None)
    with (
        replaced(model_runner, "load_model_with_memory_saver", lambda **_: loaded),
        # There are no other ranks to wait for.
        replaced(model_runner, "dist_barrier_after_load", lambda **_: None),
    ):
        return model_runner.ModelRunner(
            model_config=model_config,
            mem_fraction_static=arguments.mem_fraction_static,
            gpu_id=0,
            nccl_port=0,
            server_args=arguments,
        )


def pool_sizes(runner: Any, before: float, after: float) -> Any:
    """SGLang's ``MemoryPoolConfig`` for a loaded model and the published arguments.

    Args:
        runner: a ``ModelRunner``.
        before: GiB that were free before the model was loaded.
        after: GiB that are free now.

    Raises:
        RuntimeError, ValueError: SGLang's, where nothing is left for a KV cache.
    """
    from sglang.srt.mem_cache import kv_cache_configurator

    with replaced(kv_cache_configurator, "get_available_gpu_memory", lambda *_, **__: after):
        runner.init_kv_cache_configurator()
        return runner.kv_cache_configurator._resolve_memory_pool_config(before)


def _mem_fraction_static(rank: SimulatedRank, gpu: GPU) -> float:
    """As SGLang resolves it for a server on such a GPU."""
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups import memory_hook
    from sglang.srt.platforms import current_platform

    with (
        _without_limits_of_the_reference(),
        replaced(memory_hook, "get_device_memory_capacity", lambda *_: gpu.memory >> 20),
        replaced(torch.cuda, "get_device_capability", lambda *_: gpu.capability),
        # What SGLang takes for granted on a GPU for models with linear attention.
        replaced(current_platform, "support_mamba_cache_extra_buffer", lambda *_: True),
    ):
        rank.publish(**_ON_A_GPU)
        return float(runtime_context.get_schedule().mem_fraction_static)


@contextlib.contextmanager
def _without_limits_of_the_reference() -> Iterator[None]:
    """The platform that SGLang takes here in place of a GPU serves few tokens by default."""
    from sglang.srt.platforms import current_platform

    with replaced(current_platform, "apply_server_args_defaults", lambda *_: None):
        yield
