"""A stand-in for an RL trainer: sends a checkpoint's tensors to a running server, or to an engine of its own.

    python -m harness.trainer distributed --url http://127.0.0.1:30000 --checkpoint FOLDER
    python -m harness.trainer engine --model FOLDER --checkpoint FOLDER --prompts '[[1, 2, 3]]'

The first joins the server in a process group over gloo, as rank 0, and broadcasts. The second prints, as one line of
JSON, the tokens that an ``sglang.Engine`` generates before and after each of four updates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.loads.loads import free_port
from workbench.loads.serving import post
from workbench.loads.updates import tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

NamedTensor = tuple[str, "torch.Tensor"]

GROUP = "trainer"
_TENSORS_A_CALL = 16
_IDLE_SECONDS = 60.0


class TrainerError(RuntimeError):
    """A trainer's process has failed.

    Args:
        code: exit code.
        printed: the end of what it has printed.
    """

    def __init__(self, code: int, printed: str) -> None:
        super().__init__(f"exit code {code}: {printed}")
        self.code = code


def broadcast(url: str, checkpoint: Path, ranks: int = 1, dies_after: int | None = None) -> None:
    """All tensors of ``checkpoint``, some at a time, by ``update_weights_from_distributed``.

    Args:
        url: of the server.
        checkpoint: what is sent.
        ranks: of the server.
        dies_after: tensors after which this process kills itself; None, it does not.

    Raises:
        ServerError: the server answered that something failed.
    """
    import torch
    from sglang.srt.utils import init_custom_process_group

    port = free_port()
    joining = {"master_address": "127.0.0.1", "master_port": port, "rank_offset": 1, "world_size": 1 + ranks}
    left = itertools.count(dies_after, -1) if dies_after is not None else itertools.repeat(1)
    with ThreadPoolExecutor(1) as server:
        answer = server.submit(
            post, url, "init_weights_update_group", {**joining, "group_name": GROUP, "backend": "gloo"}
        )
        group = init_custom_process_group(
            backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=1 + ranks, rank=0, group_name=GROUP
        )
        answer.result()
        if has_sessions():
            post(url, "begin_weight_update", {})
        for tensors in calls_of(checkpoint):
            names, shapes = [name for name, _ in tensors], [list(tensor.shape) for _, tensor in tensors]
            dtypes = [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors]
            described = {"names": names, "dtypes": dtypes, "shapes": shapes, "group_name": GROUP}
            answer = server.submit(post, url, "update_weights_from_distributed", described)
            for _, tensor in tensors:
                if not next(left):
                    os.kill(os.getpid(), signal.SIGKILL)
                torch.distributed.broadcast(tensor, src=0, group=group)
            answer.result()
        try:
            if has_sessions():
                post(url, "end_weight_update", {})
        finally:
            post(url, "destroy_weights_update_group", {"group_name": GROUP})


def until_idle(url: str) -> None:
    """Wait until the server's scheduler has let go of all requests: it answers a little before that, and an update that
    comes in between fails, since the cache of a running request cannot be flushed.

    Raises:
        ServerError: there are still requests after a minute.
    """
    post(url, f"flush_cache?timeout={_IDLE_SECONDS}", {})


def engine_updates(model: Path, checkpoint: Path, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Update an engine to ``checkpoint`` by half an expert, by all tensors, back to ``model`` by flattened buckets, and
    to ``checkpoint`` from disk.

    Returns:
        ``tokens`` before and after each, and the ``answers`` to the updates.
    """
    import sglang

    engine = sglang.Engine(
        model_path=str(model), device="cpu", quantization="fp8", random_seed=0, log_level="warning", port=free_port()
    )
    try:
        found = {"tokens": [_tokens(engine, prompts, new_tokens)], "answers": []}
        for update in (_send_half_an_expert, _send_tensors, _send_buckets, _read_from_disk):
            found["answers"].append(update(engine, model if update is _send_buckets else checkpoint))
            found["tokens"].append(_tokens(engine, prompts, new_tokens))
        return found
    finally:
        engine.shutdown()


def _tokens(engine: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    answers = engine.generate(input_ids=prompts, sampling_params=sampling)
    idle = engine.loop.run_until_complete(engine.tokenizer_manager.flush_cache(timeout_s=_IDLE_SECONDS))
    if not idle.success:
        raise RuntimeError(f"the engine is not idle after its answers: {idle.message}")
    return [answer["output_ids"] for answer in answers]


def _send_half_an_expert(engine: Any, checkpoint: Path) -> list[Any]:
    half = next([(name, tensor)] for name, tensor in tensors_of(checkpoint) if "up_proj" in name)
    return _in_a_session(engine, lambda: [engine.update_weights_from_tensor(half)])


def _send_tensors(engine: Any, checkpoint: Path) -> list[Any]:
    return _in_a_session(
        engine, lambda: [engine.update_weights_from_tensor(tensors) for tensors in calls_of(checkpoint)]
    )


def _send_buckets(engine: Any, checkpoint: Path) -> list[Any]:
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    def send(tensors: list[NamedTensor]) -> Any:
        bucket = FlattenedTensorBucket(named_tensors=tensors)
        content = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
        payload = [MultiprocessingSerializer.serialize(content)]
        return engine.update_weights_from_tensor(payload, load_format="flattened_bucket")

    return _in_a_session(engine, lambda: [send(tensors) for tensors in calls_of(checkpoint)])


def _in_a_session(engine: Any, update: Callable[[], list[Any]]) -> list[Any]:
    """Answers to the calls that ``update`` makes, and to the session's begin and end where there are sessions."""
    if not has_sessions():
        return update()
    return [engine.begin_weight_update(), *update(), engine.end_weight_update()]


def has_sessions() -> bool:
    """Whether this release has update sessions, and requires them (since 0.5.21)."""
    import sglang

    return hasattr(sglang.Engine, "begin_weight_update")


def _read_from_disk(engine: Any, checkpoint: Path) -> list[Any]:
    return [engine.update_weights_from_disk(str(checkpoint))]


def calls_of(checkpoint: Path) -> Iterator[list[NamedTensor]]:
    """The tensors of a checkpoint in several calls: what belongs together comes apart."""
    tensors = list(tensors_of(checkpoint))
    calls = -(-len(tensors) // _TENSORS_A_CALL)
    for call in range(calls):
        yield tensors[call::calls]


def run_in_a_process(*arguments: object) -> str:
    """Run this module with ``arguments``; what it has printed.

    Raises:
        TrainerError: it failed.
    """
    command = (sys.executable, "-m", "harness.trainer", *map(str, arguments))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SGLANG_STREAMFP8": "require"}
    # A session of its own: an engine that fails kills its process group.
    ran = subprocess.run(
        command, env=environ, capture_output=True, text=True, timeout=600, start_new_session=True, check=False
    )
    if ran.returncode:
        raise TrainerError(ran.returncode, ran.stdout[-4000:] + ran.stderr[-8000:])
    return ran.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    distributed, engine = kinds.add_parser("distributed"), kinds.add_parser("engine")
    distributed.add_argument("--url", required=True)
    distributed.add_argument("--ranks", type=int, default=1)
    distributed.add_argument("--dies-after", type=int)
    engine.add_argument("--model", type=Path, required=True)
    engine.add_argument("--prompts", type=json.loads, required=True)
    engine.add_argument("--new-tokens", type=int, default=8)
    for kind in (distributed, engine):
        kind.add_argument("--checkpoint", type=Path, required=True)
    chosen = parser.parse_args()
    if chosen.kind == "distributed":
        broadcast(chosen.url, chosen.checkpoint, chosen.ranks, chosen.dies_after)
    else:
        print(
            json.dumps(engine_updates(chosen.model, chosen.checkpoint, chosen.prompts, chosen.new_tokens)), flush=True
        )


if __name__ == "__main__":
    main()
