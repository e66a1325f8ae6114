# SPDX-License-Identifier: Apache-2.0
"""Simulate one rank of an SGLang server in this process: its configuration and groups, without GPUs or other ranks.

The steps are those of SGLang's scheduler process: publish the server's arguments, create the parallel groups, build the
model as its loader does. The groups are PyTorch's ``fake`` ones, which answer collectives without communicating.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from packaging.version import Version

from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.hooks import releases
from sglang_overlay.load import eligibility
from sglang_overlay.offline.plan.job import DeviceWork, Layout
from sglang_overlay.offline.plan.replacing import replaced

FIRST_RELEASE = "0.5.21"
"""The first release with separate functions to set up arguments, ranks and groups (``runtime_context``)."""


class UnsimulatedReleaseError(StreamFP8Error):
    """The installed SGLang cannot simulate a rank."""


class NotOnlineFP8Error(StreamFP8Error):
    """The model would not be quantized while it is loaded."""


Weights = Callable[[], Iterator[tuple[str, torch.Tensor]]]


@dataclass(frozen=True)
class SimulatedRank:
    """What is needed to load a model on one rank; valid inside ``simulated_rank``.

    Attributes:
        folder, layout, rank, server_args: as given.
        model_config, load_config: SGLang's.
    """

    folder: Path
    layout: Layout
    rank: int
    server_args: Mapping[str, Any]
    model_config: Any
    load_config: Any

    def publish(self, **changes: Any) -> Any:
        """Publish the server's arguments once more, with ``changes`` to what the user has not set; return them."""
        return _publish(self.folder, self.layout, self.rank, {**changes, **self.server_args})

    @property
    def architecture(self) -> str:
        """Name of the model's class in its configuration."""
        return ", ".join(self.model_config.hf_config.architectures or ["unknown"])

    def load(self, device: torch.device, weights: Weights) -> torch.nn.Module:
        """Like ``DefaultModelLoader.load_model``, but with tensors from ``weights`` instead of the checkpoint's.

        Raises:
            NotOnlineFP8Error: the checkpoint is quantized already.
        """
        from sglang.srt.model_loader import loader
        from sglang.srt.model_loader.utils import set_default_torch_dtype

        quant_config = loader._get_quantization_config(self.model_config, self.load_config)
        if not eligibility.is_online_fp8(quant_config):
            raise NotOnlineFP8Error(
                "this checkpoint is quantized already, as quantization_config in its config.json says, so nothing is "
                "quantized while it is loaded. To plan for its bf16 weights use their config.json, which has no such "
                "entry"
            )
        with set_default_torch_dtype(self.model_config.dtype), torch.no_grad():
            # Some layers create their weights on the current device by this name.
            with device, replaced(torch.cuda, "current_device", lambda: device):
                model = loader._initialize_model(self.model_config, self.load_config, quant_config)
            loader.DefaultModelLoader.load_weights_and_postprocess(model, weights(), device)
        found: torch.nn.Module = model.eval()
        return found


def can_simulate() -> bool:
    """Whether the installed SGLang is one that ``simulated_rank`` knows."""
    return Version(releases.installed() or "0") >= Version(FIRST_RELEASE)


@contextlib.contextmanager
def simulated_rank(
    folder: Path, layout: Layout, rank: int, server_args: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[SimulatedRank]:
    """Simulate rank ``rank`` of ``layout``, serving ``folder`` with fp8 quantization, inside the block.

    Args:
        folder: contains the model's ``config.json``.
        layout: sizes of the kinds of parallelism.
        rank: ``pp_rank * tp + tp_rank``.
        server_args: further fields of SGLang's ``ServerArgs``.

    Raises:
        UnsimulatedReleaseError: the installed SGLang is too old.
    """
    if not can_simulate():
        raise UnsimulatedReleaseError(
            f"SGLang {releases.installed()} sets a rank's configuration and groups up in another way than is known "
            f"here, which is that of SGLang {FIRST_RELEASE} and later. Plan and export with one of those: neither what "
            "a load needs nor what it makes differs much from release to release"
        )
    from sglang.srt import runtime_context
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap, parallel_state
    from sglang.srt.environ import envs

    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(torch.cuda, "get_device_capability", _hopper))
        arguments = _publish(folder, layout, rank, server_args)
        _initialize_kernels()
        model_config = ModelConfig.from_server_args(arguments)
        try:
            with _fake_groups(layout.ranks, rank), envs.SGLANG_USE_MESSAGE_QUEUE_BROADCASTER.override(False):
                parallel_state.set_custom_all_reduce(False)
                bootstrap._init_parallel_groups(
                    backend="fake", dist_init_method="fake", server_args=arguments, gpu_id=0
                )
                bootstrap.init_layer_runtime(model_config=model_config)
                yield SimulatedRank(folder, layout, rank, server_args, model_config, LoadConfig())
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
            runtime_context.reset_context()


def _publish(folder: Path, layout: Layout, rank: int, server_args: Mapping[str, Any]) -> Any:
    from sglang.srt import runtime_context

    arguments = _server_args(folder, layout, server_args)
    pp_rank, tp_rank = divmod(rank, layout.tp)
    place = runtime_context.spawn_world_rank(arguments, tp_rank=tp_rank, pp_rank=pp_rank)
    ranks = runtime_context.SpawnRanks(world_rank=place, gpu_id=0)
    runtime_context.publish(arguments, role="scheduler", ranks=ranks)
    return arguments


def _server_args(folder: Path, layout: Layout, more: Mapping[str, Any]) -> Any:
    from sglang.srt.server_args import ServerArgs

    fields: dict[str, Any] = {
        "model_path": str(folder),
        # For attention backends and process groups only; tensors may be on another device.
        "device": "cpu",
        "quantization": "fp8",
        "tp_size": layout.tp,
        "ep_size": layout.ep,
        "pp_size": layout.pp,
        "dp_size": layout.dp,
        "enable_dp_attention": layout.dp_attention,
        "skip_tokenizer_init": True,
        "cuda_graph_backend_decode": "disabled",
        "cuda_graph_backend_prefill": "disabled",
        "log_level": "error",
        **more,
    }
    return ServerArgs(**fields)


def _hopper(*_: Any) -> tuple[int, int]:
    """Answers what SGLang asks of the GPU, also with device ``cpu``, where a model has sparse attention."""
    return 9, 0


def _initialize_kernels() -> None:
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.layers.quantization.fp4_utils import initialize_fp4_gemm_config
    from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
    from sglang.srt.layers.quantization.unquant import initialize_bf16_gemm_config

    initialize_moe_config()
    initialize_fp8_gemm_config()
    initialize_bf16_gemm_config()
    initialize_fp4_gemm_config()


@contextlib.contextmanager
def _fake_groups(size: int, rank: int) -> Iterator[None]:
    """A world of ``size`` ranks of which only ``rank`` exists. gloo groups are faked too: they would wait for all."""
    import torch.distributed
    from sglang.srt.distributed.device_communicators import pynccl
    from torch.testing._internal.distributed.fake_pg import FakeStore

    new_group = torch.distributed.new_group

    def fake_group(ranks: Any = None, *_: Any, **__: Any) -> Any:
        return new_group(ranks, backend="fake")

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    with replaced(torch.distributed, "new_group", fake_group), replaced(pynccl, "NCCLLibrary", _no_library):
        yield


def _no_library(*_: Any) -> Any:
    """Fails as on a machine without NCCL, so that SGLang does not try to communicate."""
    raise OSError("a simulated rank has no NCCL")


class _InlineExecutor:
    """A ``ThreadPoolExecutor`` that runs each task immediately."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _InlineExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args, **kwargs))
        return future

    def shutdown(self, *_: Any, **__: Any) -> None:
        pass


@contextlib.contextmanager
def loading_in_this_thread() -> Iterator[None]:
    """Run models' thread pool tasks immediately: dispatch modes and accounts are per thread, and order matters."""
    import concurrent.futures

    with replaced(concurrent.futures, "ThreadPoolExecutor", _InlineExecutor):
        yield


@contextlib.contextmanager
def cuda_kernels(work: DeviceWork) -> Iterator[None]:
    """Choose schemes as on a Hopper or later GPU; kernels' results are filled with zeros, not computed.

    ``scaled_fp8_quant`` and ``per_token_group_quant_fp8`` of ``fp8_kernel.py`` allocate only their results. The former
    launches two kernels (``per_tensor_quant_fp8.cuh``), the latter one (``per_token_quant_fp8.cuh``).

    Args:
        work: counts the launches.
    """
    from sglang.srt.layers.quantization import fp8
    from sglang.srt.layers.rotary_embedding import factory

    on_cpu = factory.get_rope_cpu

    def rotary(*arguments: Any) -> Any:
        # A rank's device is ``cpu``, for which SGLang knows only a scaled one; GLM-5's is not.
        *asked, _ = arguments
        _, _, _, _, _, scaling, *_ = asked
        return factory.get_rope(*asked) if scaling is None else on_cpu(*arguments)

    def per_tensor(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = torch.zeros(1, dtype=torch.float32, device=values.device)
        # The zeros of the result count as the second launch.
        work.launches += 1
        return torch.zeros(values.shape, dtype=fp8.fp8_dtype, device=values.device), scale

    def per_group(
        values: torch.Tensor, size: int, *, output_q: torch.Tensor | None = None, output_s: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # The zeros of the values count as the launch.
        if output_q is not None and output_s is not None:
            return output_q.zero_(), output_s
        shape = (*values.shape[:-1], values.shape[-1] // size)
        scale = torch.empty(shape, dtype=torch.float32, device=values.device)
        return torch.zeros(values.shape, dtype=fp8.fp8_dtype, device=values.device), scale

    with (
        replaced(fp8, "cutlass_fp8_supported", lambda: True),
        replaced(fp8, "scaled_fp8_quant", per_tensor),
        replaced(fp8, "per_token_group_quant_fp8", per_group),
        replaced(factory, "get_rope_cpu", rotary),
    ):
        yield
