"""Comparing loads, and real loads of a tiny checkpoint by the workers."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import TYPE_CHECKING

import pytest
from workbench.loads.checkpoints import CheckpointSpec, build
from workbench.loads.fingerprints import TensorPrint
from workbench.loads.job import LoadJob, RankResult, changed_environ
from workbench.loads.loads import PROMPTS, LoadFailed, LoadResult, LoadWorkers, compare

from sglang_overlay.observe.memory import MemoryUsage

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WEIGHT = TensorPrint("parameter", "torch.float8_e4m3fn", (4, 8), (8, 1), "cpu", "aa", "Parameter", requires_grad=False)


def result(tensors: dict[str, TensorPrint], **changes: object) -> LoadResult:
    rank = RankResult(
        rank=0,
        tensors=tensors,
        flags={},
        parameter_order=tuple(tensors),
        model_bytes=0,
        load_seconds=0.0,
        load_cpu_seconds=0.0,
        job_seconds=0.0,
        memory=MemoryUsage("RssAnon", 0, 0, 0),
        tokens=((1, 2),),
        logits_sha256="bb",
        logits_finite=True,
        log=(),
    )
    return LoadResult((dataclasses.replace(rank, **changes),))  # type: ignore[arg-type]


def test_equal_loads_have_no_differences() -> None:
    assert compare(result({"w": WEIGHT}), result({"w": WEIGHT})) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sha256": "ab"}, "rank 0: w: bytes differ (torch.float8_e4m3fn [4, 8])"),
        ({"stride": (1, 4)}, "rank 0: w: stride (8, 1) != (1, 4)"),
        ({"shape": (8, 4)}, "rank 0: w: shape (4, 8) != (8, 4)"),
        ({"dtype": "torch.bfloat16"}, "rank 0: w: dtype torch.float8_e4m3fn != torch.bfloat16"),
        ({"device": "meta"}, "rank 0: w: device cpu != meta"),
        ({"kind": "buffer"}, "rank 0: w: kind parameter != buffer"),
    ],
)
def test_each_aspect_of_a_tensor_is_compared(change: dict[str, object], said: str) -> None:
    changed = dataclasses.replace(WEIGHT, **change)  # type: ignore[arg-type]
    assert compare(result({"w": WEIGHT}), result({"w": changed})) == [said]


def test_names_in_one_load_only_are_listed_by_side() -> None:
    lines = compare(result({"w": WEIGHT, "w_kc": WEIGHT}), result({"w": WEIGHT, "extra": WEIGHT}))
    assert lines == ["rank 0: w_kc: only in the first", "rank 0: extra: only in the second"]


def test_order_of_parameters_is_compared() -> None:
    one, other = result({"a": WEIGHT, "b": WEIGHT}), result({"b": WEIGHT, "a": WEIGHT})
    assert compare(one, other) == ["rank 0: named_parameters come in another order"]


def test_tokens_and_logits_are_compared_where_both_generated() -> None:
    one = result({"w": WEIGHT})
    assert compare(one, result({"w": WEIGHT}, tokens=((1, 3),), logits_sha256="cc")) == [
        "rank 0: tokens ((1, 2),) != ((1, 3),)",
        "rank 0: logits of the prompts differ",
    ]
    assert compare(one, result({"w": WEIGHT}, tokens=(), logits_sha256="")) == []


def test_loads_over_different_rank_counts_do_not_compare() -> None:
    one = result({"w": WEIGHT})
    assert compare(one, LoadResult((*one.ranks, *one.ranks))) == ["ranks: 1 != 2"]


def test_changed_environ_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAYS", "1")
    monkeypatch.delenv("COMES", raising=False)
    with changed_environ({"STAYS": None, "COMES": "2"}):
        assert "STAYS" not in os.environ
        assert os.environ["COMES"] == "2"
    assert os.environ["STAYS"] == "1"
    assert "COMES" not in os.environ


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoadWorkers]:
    with LoadWorkers(tmp_path_factory.mktemp("workers")) as started:
        yield started


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


def stock_job(path: Path, **changes: object) -> LoadJob:
    return dataclasses.replace(LoadJob(path, streaming="0", prompts=PROMPTS, new_tokens=3), **changes)  # type: ignore[arg-type]


def test_loading_twice_in_one_process_gives_the_same_model_and_tokens(workers: LoadWorkers, cache: Path) -> None:
    job = stock_job(build(CheckpointSpec("qwen3_moe"), cache))
    first, second = workers.load_all([job, job])
    assert compare(first, second) == []
    assert [len(ids) for ids in first.tokens] == [3] * len(PROMPTS)
    assert first.ranks[0].logits_finite
    assert first.ranks[0].tensors["model.layers.0.mlp.experts.w13_weight"].dtype == "torch.float8_e4m3fn"
    assert first.ranks[0].memory.metric == "RssAnon"


def test_a_job_leaves_nothing_that_changes_the_next_one(workers: LoadWorkers, cache: Path) -> None:
    """The layered loader gives all modules new memory, those which SGLang shares between models too."""
    overrides = (("architectures", ("TorchNativeLlamaForCausalLM",)), ("model_type", "llama"))
    layered = build(CheckpointSpec("qwen3", overrides=overrides), cache)
    job = stock_job(build(CheckpointSpec("qwen3_moe"), cache))
    workers.load(stock_job(layered, prompts=(), server_args={"load_format": "layered"}, uninitialized=math.nan))
    assert compare(workers.load_fresh(job), workers.load(job)) == []


def test_stock_has_no_hook_in_its_way(workers: LoadWorkers, cache: Path) -> None:
    """Each hook of a load asks for the settings, and these are an error."""
    wrong = {"SGLANG_STREAMFP8_SCHEME": "block"}
    job = stock_job(build(CheckpointSpec("qwen3"), cache), prompts=())
    assert compare(workers.load(dataclasses.replace(job, environ=wrong)), workers.load(job)) == []
    with pytest.raises(LoadFailed, match="only streaming can serve"):
        workers.load(dataclasses.replace(job, environ={**wrong, "SGLANG_STREAMFP8_REPORT": str(cache)}))


def test_streaming_has_its_hooks_again_after_stock(workers: LoadWorkers, cache: Path) -> None:
    job = stock_job(build(CheckpointSpec("qwen3"), cache), prompts=())
    _, streamed = workers.load_all([job, dataclasses.replace(job, streaming="require")])
    assert any("StreamFP8: " in line and " units in " in line for line in streamed.log)


def test_another_seed_shows_as_different_bytes(workers: LoadWorkers, cache: Path) -> None:
    one = workers.load(stock_job(build(CheckpointSpec("qwen3"), cache), prompts=()))
    other = workers.load(stock_job(build(CheckpointSpec("qwen3", seed=1), cache), prompts=()))
    assert any("layers.0.self_attn.qkv_proj.weight: bytes differ" in line for line in compare(one, other))


def test_ranks_hold_their_own_shards(workers: LoadWorkers, cache: Path) -> None:
    loaded = workers.load(stock_job(build(CheckpointSpec("qwen3"), cache), tp_size=2))
    first, second = (rank.tensors["model.layers.0.mlp.down_proj.weight"] for rank in loaded.ranks)
    assert first.shape == second.shape
    assert first.sha256 != second.sha256
    assert loaded.ranks[0].tokens == loaded.ranks[1].tokens


def test_workers_go_on_after_a_job_that_failed(workers: LoadWorkers, cache: Path) -> None:
    broken = build(CheckpointSpec("qwen3"), cache / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(LoadFailed, match="Cannot find any model weights"):
        workers.load(stock_job(broken))
    assert workers.load(stock_job(build(CheckpointSpec("qwen3"), cache), prompts=())).ranks[0].tensors


@pytest.mark.parametrize("threads", [1, 3])
def test_load_runs_with_as_many_threads_as_its_job_says(workers: LoadWorkers, cache: Path, threads: int) -> None:
    job = LoadJob(build(CheckpointSpec("qwen3"), cache), threads=threads, recorder="harness.load_threads:noted")
    assert workers.load(job).ranks[0].recorded == [threads]
