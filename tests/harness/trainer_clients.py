# SPDX-License-Identifier: Apache-2.0
"""Trainers' own code for sending weights, at work on a real server; and replays of trainers that cannot run here.

    with Trainer(url, folder, packages, model) as trainer:
        trainer.step("verl", checkpoint)

The trainer is a process of its own (``python -m harness.trainer_clients ...``), or one for each of its ranks. Each
client of ``CLIENTS`` keeps its state from step to step. A step ends when the client's own code has returned.

What differs from a GPU: tensors go through shared memory, whose names any process can open, where a trainer sends CUDA
IPC handles; SGLang's patch of these handles, which expects a GPU's, is left out. Groups are gloo's.

Trainers that know nothing of SGLang's update sessions (since 0.5.21, which SGLang requires) are given one around
each step, where there are sessions.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from workbench.loads.loads import free_port
from workbench.loads.serving import ServerError, post
from workbench.loads.updates import tensors_of

from harness.trainer import NamedTensor, has_sessions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence


_SECONDS = 300
_GROUP = "trainer"
_BUCKET_BYTES = 1 << 20
"""Of one call; several to a tiny model, and so a bucket's end lies between tensors that share a scale."""


class Trainer:
    """The trainer's processes, killed when it is left.

    Args:
        url: of the server.
        folder: for logs, and for what clients write.
        packages: folder with the trainers' packages, seen after the environment's own.
        model: folder of the checkpoint that training begins with.
        ranks: number of processes, that of the server's ranks.
    """

    def __init__(self, url: str, folder: Path, packages: Path, model: Path, ranks: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._logs = [folder / f"trainer-{rank}.txt" for rank in range(ranks)]
        arguments = ("--url", url, "--folder", folder, "--model", model)
        command = [sys.executable, "-m", "harness.trainer_clients", *map(str, arguments)]
        shared = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*sys.path, str(packages)]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
            # Ray would set it.
            "RAY_LOCAL_WORLD_SIZE": str(ranks),
        }
        self._processes = []
        for rank, log in enumerate(self._logs):
            environ = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as output:
                process = subprocess.Popen(
                    command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
                    start_new_session=True,
                )  # fmt: skip
            self._processes.append(process)

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *about: object) -> None:
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def step(self, client: str, checkpoint: Path) -> None:
        """One training step, whose weights are those of ``checkpoint``, sent by a client.

        Raises:
            RuntimeError: the client's code raised.
        """
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{client} {checkpoint}\n")
            process.stdin.flush()
        for process, log in zip(self._processes, self._logs, strict=True):
            assert process.stdout is not None
            if process.stdout.readline().strip() != "done":
                raise RuntimeError(f"{client} failed: {log.read_text(errors='replace')[-6000:]}")


# ---------------------------------------------------------------------------------------------------------------------
# The process
# ---------------------------------------------------------------------------------------------------------------------


def rank() -> int:
    return int(os.environ["RANK"])


@contextlib.contextmanager
def session(url: str) -> Iterator[None]:
    """What a trainer that knows nothing of sessions would have to put around a step."""
    if rank() != 0 or not has_sessions():
        yield
        return
    post(url, "begin_weight_update", {})
    try:
        yield
    except Exception:
        with contextlib.suppress(ServerError):
            post(url, "end_weight_update", {})
        raise
    post(url, "end_weight_update", {})


def gloo() -> None:
    import torch

    if torch.distributed.is_initialized():
        return
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=_SECONDS))


def device_mesh() -> Any:
    """As verl makes it: of the ranks that share a server."""
    from torch.distributed.device_mesh import init_device_mesh

    shape = (1, int(os.environ["WORLD_SIZE"]), 1)
    return init_device_mesh("cpu", mesh_shape=shape, mesh_dim_names=("dp", "infer_tp", "infer_pp"))


def sharded(tensors: Iterable[NamedTensor], mesh: Any) -> Iterator[NamedTensor]:
    """As FSDP holds parameters: each rank has its rows."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for name, tensor in tensors:
        yield name, distribute_tensor(tensor, mesh["infer_tp"], [Shard(0)])


def buckets(tensors: Iterable[NamedTensor]) -> Iterator[list[NamedTensor]]:
    """In the order they come, as many as fit."""
    bucket: list[NamedTensor] = []
    for named in tensors:
        if bucket and sum(tensor.nbytes for _, tensor in (*bucket, named)) > _BUCKET_BYTES:
            yield bucket
            bucket = []
        bucket.append(named)
    yield bucket


def experts_last(checkpoint: Path) -> list[NamedTensor]:
    """The order of Megatron's trainers."""
    return sorted(tensors_of(checkpoint), key=lambda named: ".experts." in named[0])


def weight_sync(options: argparse.Namespace) -> Callable[[Path], None]:
    """SGLang's own ``sglang.srt.weight_sync.utils.update_weights``, of DTensors, one call a bucket."""
    gloo()
    import pybase64
    from sglang.srt.weight_sync.utils import update_weights

    async def send(request: Any) -> Any:
        sent = [pybase64.b64encode(payload).decode() for payload in request.serialized_named_tensors]
        return post(options.url, "update_weights_from_tensor", {"serialized_named_tensors": sent}).json()

    mesh, engine = device_mesh(), SimpleNamespace(update_weights_from_tensor=send)

    def step(checkpoint: Path) -> None:
        with session(options.url):
            for bucket in buckets(sharded(tensors_of(checkpoint), mesh)):
                asyncio.run(update_weights(engine, bucket, "infer_tp", mesh))

    return step


def verl(options: argparse.Namespace) -> Callable[[Path], None]:
    """verl's ``ServerAdapter``, whose ``update_weights`` sends what a hybrid worker's FSDP engine exports."""
    adapter = _verls_adapter(options)

    def step(checkpoint: Path) -> None:
        with session(options.url):
            asyncio.run(adapter.update_weights(sharded(tensors_of(checkpoint), adapter.device_mesh)))

    return step


def _verls_adapter(options: argparse.Namespace) -> Any:
    gloo()
    _verl_on_a_cpu()
    from verl.workers.config.rollout import CheckpointEngineConfig, RolloutConfig
    from verl.workers.rollout.sglang_rollout.http_server_engine import AsyncHttpServerAdapter
    from verl.workers.rollout.sglang_rollout.sglang_rollout import ServerAdapter

    host, port = options.url.removeprefix("http://").split(":")
    config = RolloutConfig(
        name="sglang",
        tensor_model_parallel_size=int(os.environ["WORLD_SIZE"]),
        checkpoint_engine=CheckpointEngineConfig(update_weights_bucket_megabytes=_BUCKET_BYTES >> 20),
    )
    # verl's HFModelConfig makes the actor's tokenizer and attention; of it the adapter reads these.
    model = SimpleNamespace(hf_config=SimpleNamespace(model_type="qwen3"), lora={}, lora_rank=0)
    adapter = ServerAdapter(config, model, device_mesh())
    # In place of what a Ray actor tells the first rank; the others have no server of their own.
    adapter._init_server_adapter = _nothing
    if rank() == 0:
        # SGLang's engines have sessions since 0.5.21, and those of verl 0.9.1 do not: it cannot make one.
        wanted = dict.fromkeys(AsyncHttpServerAdapter.__abstractmethods__)
        adapter._engine = type("Adapter", (AsyncHttpServerAdapter,), wanted)(
            model_path=str(options.model), host=host, port=int(port), launch_server=False, device="cpu"
        )
    return adapter


async def _nothing() -> None:
    """Nothing is left to find out."""


def _verl_on_a_cpu() -> None:
    """verl's plugins add devices; it has none for a machine without one."""
    import torch
    from verl.plugin.platform import platform_base, platform_manager

    names = platform_base.PlatformBase.__abstractmethods__
    missing = {name: property(lambda _: None) for name in names}
    values = {
        "device_name": property(lambda _: "cpu"),
        "device_module": property(lambda _: torch.cpu),
        "current_device": lambda _: "cpu",
        "is_available": lambda _: True,
        "communication_backend_name": lambda _: "gloo",
    }
    cpu = type("PlatformCPU", (platform_base.PlatformBase,), {**missing, **values})
    platform_manager.set_platform(cpu())


def areal_disk(options: argparse.Namespace) -> Callable[[Path], None]:
    """AReaL's ``FSDPEngine`` with ``weight_update_mode: disk``: saves its model, and has the servers read it."""
    engine = _areal(options)
    from areal.api import WeightUpdateMeta

    meta = WeightUpdateMeta(type="disk", path=str(options.folder / "weight_update"))
    engine.connect_engine(engine.rollout_engine, meta)
    return functools.partial(_areal_step, engine, meta, contextlib.nullcontext)


def areal_xccl(options: argparse.Namespace) -> Callable[[Path], None]:
    """AReaL's ``FSDPEngine`` with ``weight_update_mode: xccl``: broadcasts, a bucket a call."""
    engine = _areal(options)
    from areal.api import ModelAllocation, WeightUpdateMeta

    allocation = ModelAllocation.from_str("sglang:d1", name="rollout")
    meta = WeightUpdateMeta.from_fsdp_xccl(allocation, weight_chunked_mem_mb=_BUCKET_BYTES >> 20)
    engine.connect_engine(engine.rollout_engine, meta)
    return functools.partial(_areal_step, engine, meta, functools.partial(session, options.url))


def _areal(options: argparse.Namespace) -> Any:
    """An engine of AReaL's whose model is what transformers reads from the folder, and that knows the server."""
    gloo()
    import torch
    from areal.api.cli_args import InferenceEngineConfig, NameResolveConfig, TrainEngineConfig
    from areal.engine import fsdp_engine
    from areal.engine.sglang_remote import RemoteSGLangEngine
    from areal.utils import name_resolve
    from transformers import AutoModelForCausalLM

    # It asks for the address of a network, which a test's machine need not have.
    fsdp_engine.gethostip = lambda: "127.0.0.1"
    name_resolve.reconfigure(NameResolveConfig(type="nfs", nfs_record_root=str(options.folder / "names")))
    named = {"experiment_name": "streamfp8", "trial_name": "test"}
    engine = fsdp_engine.FSDPEngine(
        TrainEngineConfig(**named, path=str(options.model), backend="fsdp:d1", dtype="bfloat16")
    )
    engine.model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    engine.tokenizer, engine._cpu_group, engine._initialized = None, torch.distributed.group.WORLD, True
    rollout = RemoteSGLangEngine(InferenceEngineConfig(**named, backend="sglang:d1", pause_grace_period=0.0))
    rollout._engine.addresses = [options.url.removeprefix("http://")]
    rollout._engine.logger = fsdp_engine.logging.getLogger("rollout")
    engine.logger = rollout._engine.logger
    engine.rollout_engine = rollout
    return engine


def _areal_step(engine: Any, meta: Any, around: Callable[[], Any], checkpoint: Path) -> None:
    import torch

    # In place of an optimizer: its master weights, in float32, become the new ones.
    with torch.no_grad():
        for name, tensor in tensors_of(checkpoint):
            engine.model.get_parameter(name).copy_(tensor)
    version = engine.get_version() + 1
    engine.set_version(version)
    engine.rollout_engine.set_version(version)
    with around():
        engine.update_weights(meta)


def slime(options: argparse.Namespace) -> Callable[[Path], None]:
    """Replays ``UpdateWeightFromTensor.update_weights`` of slime (THUDM/slime 04b6c8d,
    slime/backends/megatron_utils/update_weight/update_weight_from_tensor.py): pause, flush, flattened buckets with
    the version, non-experts first, an empty one where a rank has nothing, and continue. It knows no sessions."""
    version = [0]

    def step(checkpoint: Path) -> None:
        version[0] += 1
        post(options.url, "pause_generation", {})
        post(options.url, "flush_cache", {})
        with session(options.url):
            for bucket in (*buckets(experts_last(checkpoint)), []):
                _send_bucket(options.url, bucket, weight_version=str(version[0]))
        post(options.url, "continue_generation", {})

    return step


def miles(options: argparse.Namespace) -> Callable[[Path], None]:
    """Replays miles (radixark/miles 02a214e, miles/backends/megatron_utils/update_weight/update_weight_from_tensor.py)
    and NeMo-RL's SGLang backend (``_SGLangWeightSynchronizer._refit``): pause, flush, begin, a bucket of mixed dtypes a
    call, end, continue."""
    import torch

    def step(checkpoint: Path) -> None:
        post(options.url, "pause_generation", {"mode": "retract"})
        post(options.url, "flush_cache", {})
        tensors = [
            # Routers stay in float32 in Megatron.
            (name, tensor.to(torch.float32) if "mlp.gate." in name or "norm" in name else tensor)
            for name, tensor in experts_last(checkpoint)
        ]
        with session(options.url):
            for bucket in buckets(tensors):
                _send_bucket(options.url, bucket, weight_version="7", **({"selector": "all"} if has_sessions() else {}))
        post(options.url, "continue_generation", {})

    return step


def _send_bucket(url: str, tensors: Sequence[NamedTensor], **fields: Any) -> None:
    import torch
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    content: dict[str, Any] = {"flattened_tensor": torch.empty(0, dtype=torch.uint8), "metadata": []}
    if tensors:
        bucket = FlattenedTensorBucket(named_tensors=list(tensors))
        content = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    sent = [MultiprocessingSerializer.serialize(content, output_str=True)]
    post(
        url,
        "update_weights_from_tensor",
        {"serialized_named_tensors": sent, "load_format": "flattened_bucket", "flush_cache": False, **fields},
    )


def by_name(options: argparse.Namespace) -> Callable[[Path], None]:
    """Replays SGLang's own test/registered/rl/test_update_weights_from_tensor.py: what is not quantized comes under
    parameters' names, with the load format after the client's name; then all others as usual."""
    from sglang.srt.utils import MultiprocessingSerializer

    load_format = options.load_format

    def send(tensors: list[NamedTensor], **fields: Any) -> None:
        sent = [MultiprocessingSerializer.serialize(tensors, output_str=True)]
        post(options.url, "update_weights_from_tensor", {"serialized_named_tensors": sent, **fields})

    def step(checkpoint: Path) -> None:
        tensors = list(tensors_of(checkpoint))
        direct = [named for named in tensors if "_proj" not in named[0]]
        with session(options.url):
            send(direct, load_format=load_format)
            send([named for named in tensors if "_proj" in named[0]])

    return step


def broadcast_buckets(options: argparse.Namespace) -> Callable[[Path], None]:
    """Replays the broadcast of SGLang's own test/registered/rl/test_update_weights_from_distributed.py
    (``load_format=flattened_bucket``), in the buckets of slime's and miles's
    update_weight_from_distributed.py: an answer is waited for before the next broadcast."""
    import torch
    from sglang.srt.utils import init_custom_process_group
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    port, server = free_port(), ThreadPoolExecutor(1)
    joining = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 2}
    joined = server.submit(
        post, options.url, "init_weights_update_group", {**joining, "group_name": _GROUP, "backend": "gloo"}
    )
    group = init_custom_process_group(
        backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name=_GROUP
    )
    joined.result()

    def step(checkpoint: Path) -> None:
        with session(options.url):
            for tensors in buckets(experts_last(checkpoint)):
                described = {
                    "names": [name for name, _ in tensors],
                    "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
                    "shapes": [list(tensor.shape) for _, tensor in tensors],
                    "group_name": _GROUP,
                    "load_format": "flattened_bucket",
                }
                answer = server.submit(post, options.url, "update_weights_from_distributed", described)
                flat = FlattenedTensorBucket(named_tensors=tensors).get_flattened_tensor()
                torch.distributed.broadcast(flat, src=0, group=group)
                answer.result()

    return step


def checkpoint_engine(options: argparse.Namespace) -> Callable[[Path], None]:
    """checkpoint-engine's ``ParameterServer``, by SGLang's own ``sglang.srt.checkpoint_engine.update``."""
    os.environ["PS_MAX_BUCKET_SIZE_GB"] = str(_BUCKET_BYTES / (1 << 30))
    from harness.checkpoint_engine_on_cpu import for_a_trainer

    for_a_trainer()
    from checkpoint_engine.ps import ParameterServer
    from sglang.srt.checkpoint_engine.update import req_inference, update_weights

    server, request = ParameterServer(auto_pg=True), req_inference(options.url, 1)

    def step(checkpoint: Path) -> None:
        update_weights(server, str(checkpoint), [], dict(tensors_of(checkpoint)), request, 1, options.url)
        server.unregister_checkpoint(str(checkpoint))

    return step


CLIENTS: dict[str, Callable[[argparse.Namespace], Callable[[Path], None]]] = {
    "weight_sync": weight_sync,
    "verl": verl,
    "areal_disk": areal_disk,
    "areal_xccl": areal_xccl,
    "slime": slime,
    "miles": miles,
    "by_name": by_name,
    "broadcast_buckets": broadcast_buckets,
    "checkpoint_engine": checkpoint_engine,
}


def _share_tensors_by_name() -> None:
    """Serialize tensors for processes that are no relatives."""
    import torch.multiprocessing
    from torch.multiprocessing import reductions

    torch.multiprocessing.set_sharing_strategy("file_system")
    # Has SGLang's patch of CUDA's handles believe that it is in place.
    reductions._reduce_tensor_original = reductions.reduce_tensor  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    for name in ("--folder", "--model"):
        parser.add_argument(name, type=Path, required=True)
    options = parser.parse_args()
    # Answers go where nothing else is printed.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _share_tensors_by_name()
    steps: dict[str, Callable[[Path], None]] = {}
    for line in sys.stdin:
        client, checkpoint = line.split()
        if client not in steps:
            kind, _, options.load_format = client.partition(":")
            steps[client] = CLIENTS[kind](options)
        steps[client](Path(checkpoint))
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
