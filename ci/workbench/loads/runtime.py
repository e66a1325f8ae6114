"""Set up and tear down one rank of SGLang as the installed release requires.

Releases differ in who sets up the process groups and what a ``ModelRunner`` gets: everything as arguments (until
0.5.15), a ``ParallelState`` (0.5.17, 0.5.19), or nothing, since the groups exist before (since 0.5.21). SGLang's own
signatures show which of these applies.
"""

from __future__ import annotations

import importlib
import inspect
import os
from typing import TYPE_CHECKING, Any, TypeVar

from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel
from sglang.srt.eplb import expert_location
from sglang.srt.layers import moe
from sglang.srt.layers.quantization import fp4_utils, fp8_utils, unquant
from sglang.srt.layers.rotary_embedding import factory as rotary_embeddings
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs

from sglang_overlay.cpu_reference.platform import CORES_PER_RANK, all_ranks_bound

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from sglang.srt.configs.model_config import ModelConfig

Made = TypeVar("Made")


def module(*names: str) -> ModuleType | None:
    """The first of these modules that this release has; None if it has none."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not name.startswith(error.name):
                raise
    return None


one_batch: Any = module("sglang.benchmark.one_batch", "sglang.bench_one_batch")
"""SGLang's one-batch benchmark, whose ``extend`` and ``decode`` run a batch through a runner."""
_bootstrap: Any = module("sglang.srt.distributed.bootstrap")
_context: Any = module("sglang.srt.runtime_context")


def told(called: Callable[..., Made], **offered: Any) -> Made:
    """Call ``called`` with those of the arguments that it takes."""
    taken = inspect.signature(called).parameters
    return called(**{name: value for name, value in offered.items() if name in taken})


def without_graphs() -> dict[str, Any]:
    """Fields of ``ServerArgs`` that switch CUDA graphs off."""
    fields = {"cuda_graph_backend_decode": "disabled", "cuda_graph_backend_prefill": "disabled"}
    if fields.keys() <= inspect.signature(ServerArgs).parameters.keys():
        return fields
    return {"disable_cuda_graph": True, "disable_piecewise_cuda_graph": True}


def with_decode_graphs(batch: int) -> dict[str, Any]:
    """Fields of ``ServerArgs`` that capture CUDA graphs of decoding for up to ``batch`` requests."""
    taken = inspect.signature(ServerArgs).parameters.keys()
    largest = "cuda_graph_max_bs_decode" if "cuda_graph_max_bs_decode" in taken else "cuda_graph_max_bs"
    prefill = {"cuda_graph_backend_prefill": "disabled"}
    return {largest: batch, **(prefill if prefill.keys() <= taken else {"disable_piecewise_cuda_graph": True})}


def publish(server_args: ServerArgs, rank: int) -> None:
    """Make these the process's arguments, replacing those of an earlier runner."""
    if hasattr(_context, "SpawnRanks"):
        pp_rank, tp_rank = divmod(rank, server_args.tp_size)
        world_rank = _context.spawn_world_rank(server_args, tp_rank=tp_rank, pp_rank=pp_rank)
        ranks = _context.SpawnRanks(world_rank=world_rank, gpu_id=rank)
        _context.publish(server_args, role="scheduler", ranks=ranks)
    elif hasattr(_context, "publish"):
        _context.publish(server_args, role="scheduler")
    else:
        server_args_module: Any = importlib.import_module("sglang.srt.server_args")
        server_args_module.set_global_server_args_for_scheduler(server_args)
    for configure in (
        moe.initialize_moe_config,
        fp8_utils.initialize_fp8_gemm_config,
        fp4_utils.initialize_fp4_gemm_config,
        getattr(unquant, "initialize_bf16_gemm_config", lambda: None),
    ):
        told(configure, server_args=server_args)


def build(
    runner: type[ModelRunner], server_args: ServerArgs, model_config: ModelConfig, rank: int, port: int, role: str
) -> Any:
    """A runner for the published arguments, with its model loaded.

    Args:
        runner: ``ModelRunner`` or a subclass.
        server_args: as published.
        model_config: of the model.
        rank: global rank, pipeline stages outermost.
        port: where the ranks meet.
        role: ``target``, or ``draft`` for the model of a speculative worker.
    """
    if hasattr(_bootstrap, "init_parallel_runtime"):
        device = _context.get_device().device
        _bootstrap.init_parallel_runtime(server_args=server_args, device=device, dist_port=port)
        _bootstrap.init_layer_runtime(model_config=model_config)
    if not all_ranks_bound():
        cores = os.environ.get(CORES_PER_RANK, "").split("|")
        os.environ[CORES_PER_RANK] = "|".join(cores[: server_args.tp_size])
    # Early releases do this when ModelRunner's module is imported, before the number of ranks is known.
    if current_platform.is_out_of_tree():
        current_platform.init_backend()
    place = _place(server_args, rank)
    if "ps" in inspect.signature(runner).parameters:
        wrapper: Any = importlib.import_module("sglang.srt.distributed.parallel_state_wrapper")
        if "gpu_id" in inspect.signature(wrapper.ParallelState).parameters:
            place["gpu_id"] = rank
        place = {"ps": wrapper.ParallelState.trivial(**place)}
    return told(
        runner,
        model_config=model_config,
        mem_fraction_static=server_args.mem_fraction_static,
        gpu_id=rank,
        nccl_port=port,
        server_args=server_args,
        is_draft_worker=role == "draft",
        # As SGLang's ``TpModelWorker`` has it: the first of several drafts, each of which is one MTP layer.
        draft_model_idx=0 if role == "draft" and getattr(server_args, "enable_multi_layer_eagle", False) else None,
        **place,
    )


def _place(server_args: ServerArgs, rank: int) -> dict[str, Any]:
    pp_rank, tp_rank = divmod(rank, server_args.tp_size)
    return {
        "tp_rank": tp_rank,
        "tp_size": server_args.tp_size,
        "pp_rank": pp_rank,
        "pp_size": server_args.pp_size,
        "attn_tp_rank": tp_rank,
        "attn_tp_size": server_args.tp_size,
        "moe_ep_rank": tp_rank // (server_args.tp_size // server_args.ep_size),
        "moe_ep_size": server_args.ep_size,
    }


def get_ready_to_generate(runner: Any) -> None:
    """Do what a scheduler does after loading; early releases have already done it."""
    for step in ("alloc_memory_pool", "init_attention_backends", "init_cuda_graphs"):
        getattr(runner, step, lambda: None)()


def mark_extended(request: Any) -> None:
    """Mark all of a request's prompt to be run next."""
    length = len(request.origin_input_ids)
    # Until 0.5.12.post1 it is stored; later it is a property.
    name = "fill_ids" if "fill_ids" in vars(request) else "full_untruncated_fill_ids"
    setattr(request, name, request.origin_input_ids)
    request.logprob_start_len = -1
    if hasattr(request, "set_extend_range"):
        request.set_extend_range(0, length)
    elif hasattr(request, "set_extend_input_len"):
        request.fill_len = length
        request.set_extend_input_len(length)
    else:
        request.extend_end = length


def take_down() -> None:
    """Drop the process groups, the published arguments, and what SGLang keeps of a model for the process."""
    destroy_model_parallel()
    destroy_distributed_environment()
    # Shared by all models of a process; the layered loader leaves them uninitialized.
    rotary_embeddings._ROPE_DICT.clear()
    # Until 0.5.15 a global that can be set only once.
    if hasattr(expert_location, "_global_expert_location_metadata"):
        expert_location._global_expert_location_metadata = None
    # 0.5.14 has a context that holds nothing.
    if hasattr(_context, "reset_context"):
        _context.reset_context()
