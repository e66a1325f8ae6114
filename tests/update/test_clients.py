# SPDX-License-Identifier: Apache-2.0
"""Two training steps of a streamed server by trainers' own code: verl's, AReaL's, checkpoint-engine's and SGLang's;
slime's, miles's and NeMo-RL's by replay.

After each step the server holds and generates what a fresh streaming load of the same weights does. Where SGLang has no
update sessions (before 0.5.21), trainers' buckets end between tensors that share a scale; where it has, trainers that
do not know of them get one around each step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.trainer_clients import Trainer
from update.test_update_serving import SEED, generated
from workbench.loads import serving
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS
from workbench.loads.serving import ServerError, post
from workbench.releases import environment

from sglang_overlay.settings import SCHEME_VARIABLE

TESTS = Path(__file__).parents[1]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="no Ray beside this release")
VERL = pytest.param("verl", marks=needs_ray)
REPLAYED = ("weight_sync", "slime", "miles", "broadcast_buckets")
EVERYWHERE = [VERL, *REPLAYED]


@pytest.fixture(scope="session")
def packages():
    """The trainers' packages, installed once: a folder beside the environment."""
    return environment.ensure_folder(environment.planned(), "clients")


def state_of(url):
    """What a server generates, and the checksum of each tensor; None where this release needs a GPU for that."""
    return generated(url), checksums(url)


def checksums(url):
    try:
        ranks = post(url, "weights_checker", {"action": "checksum"}).json()["ranks"]
    except ServerError as error:
        if "Found no NVIDIA driver" not in str(error):
            raise
        return None
    assert all(rank["checksums"] for rank in ranks)
    return [rank["checksums"] for rank in ranks]


@dataclass
class Served:
    """A server and its trainer.

    Attributes:
        url: of the server.
        trainer: to send weights.
        paths: of two checkpoints; the server was started with the first.
        states: what a server holds and generates after a fresh load of each.
    """

    url: str
    trainer: Trainer
    paths: tuple[Path, Path]
    states: tuple[tuple, tuple]

    def two_steps(self, client):
        """To the other weights, and back."""
        for number in (1, 0):
            self.trainer.step(client, self.paths[number])
            assert state_of(self.url) == self.states[number]


@pytest.fixture(scope="module")
def serve(checkpoint, workers, tmp_path_factory, packages):
    @contextlib.contextmanager
    def start(family, tp_size=1, scheme="", arguments=(), **fields):
        folder, port = tmp_path_factory.mktemp(family), serving.free_port()
        paths = tuple(checkpoint(family, seed=seed, **fields) for seed in (0, SEED))
        settings = ("--quantization", "fp8", "--device", "cpu", "--log-level", "info", "--tp-size", str(tp_size))
        command = serving.sglang_command(sys.executable, str(paths[0]), port, (*settings, *arguments))
        environ = {"SGLANG_STREAMFP8": "require", **({SCHEME_VARIABLE: scheme} if scheme else {})}
        trainers = {
            "PYTHONPATH": os.pathsep.join(map(str, (TESTS, packages))),
            "SGLANG_EXTERNAL_MODEL_PACKAGE": "harness.checkpoint_engine_on_cpu",
        }
        launch = serving.Launch(command, port, folder / "server.log", {**environ, **trainers})
        with serving.running(launch, timeout=900) as url:
            states = [state_of(url)]
            for path in reversed(paths):
                post(url, "update_weights_from_disk", {"model_path": str(path)})
                states.append(state_of(url))
            loaded, updated, restored = states
            assert loaded == restored
            for path, (tokens, _) in zip(paths, (loaded, updated), strict=True):
                job = LoadJob(path, streaming="require", tp_size=tp_size, prompts=PROMPTS, environ=environ)
                assert [list(ids) for ids in workers.load(job).tokens] == tokens
            with Trainer(url, folder, packages, paths[0], ranks=tp_size) as trainer:
                yield Served(url, trainer, paths, (loaded, updated))

    return start


@pytest.fixture(scope="module")
def dense(serve):
    with serve("qwen3") as served:
        yield served


DIRECT = "sglang.srt.model_executor.model_runner_components.weight_updater._model_load_weights_direct"


@pytest.fixture(scope="module")
def experts(serve):
    with serve("qwen3_moe", arguments=("--custom-weight-loader", DIRECT)) as served:
        yield served


@needs_ray
@pytest.mark.parametrize("client", ["verl", "areal_xccl", "areal_disk"])
def test_trainers_own_code_updates_a_dense_model(client, dense):
    dense.two_steps(client)


@pytest.mark.parametrize("client", EVERYWHERE)
def test_experts_are_updated(client, experts):
    experts.two_steps(client)


def test_checkpoint_engine_updates_a_server(experts, tmp_path, packages):
    with Trainer(experts.url, tmp_path, packages, experts.paths[0]) as trainer:
        dataclasses.replace(experts, trainer=trainer).two_steps("checkpoint_engine")


def test_update_replaces_all_that_is_served(experts):
    """SGLang's test_weight_checker_e2e.py fills all tensors with random values."""
    if experts.states[0][1] is None:
        pytest.skip("this release has its weight checker on a GPU only")
    post(experts.url, "weights_checker", {"action": "reset_tensors"})
    assert state_of(experts.url) != experts.states[0]
    experts.two_steps("slime")


@pytest.mark.parametrize("load_format", ["direct", DIRECT])
def test_tensors_that_are_not_quantized_come_by_their_own_names(load_format, experts):
    """As SGLang's test_update_weights_from_tensor.py sends merged parameters; and the rest as usual."""
    experts.trainer.step(f"by_name:{load_format}", experts.paths[1])
    assert state_of(experts.url) == experts.states[1]
    experts.two_steps("slime")
