# SPDX-License-Identifier: Apache-2.0
"""Streaming serves the same weights as stock: every parameter, buffer and MLA tensor, bytes, dtype, shape and stride.

Both run in real SGLang, in the same process, over real checkpoints. Checkpoints of one family hold the same tensors
whatever their files look like, so one stock load is the measure for all layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from harness.streamed import load_streamed
from workbench.loads.checkpoints import FAMILIES
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, compare

pytestmark = [pytest.mark.every_release, pytest.mark.patched]


@dataclass(frozen=True)
class Variant:
    """How the checkpoint lies on disk and how it is read."""

    files: dict[str, Any] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    loader_config: dict[str, Any] = field(default_factory=dict)


MANY = {"files": 7, "assignment": "round_robin"}
VARIANTS = {
    "one file": Variant(),
    "many files, an expert's shards apart": Variant(files=MANY),
    "files staggered by rank": Variant(files=MANY, environ={"SGLANG_SORT_WEIGHT_FILES": "1"}),
    "tensors and files shuffled": Variant(files={"files": 7, "assignment": "shuffled", "file_names": "shuffled"}),
    "one loading thread": Variant(files=MANY, loader_config={"enable_multithread_load": False}),
    "eight loading threads": Variant(files=MANY, loader_config={"enable_multithread_load": True, "num_threads": 8}),
}


@pytest.fixture(scope="session")
def stock(workers, checkpoint):
    """The stock load of a family at one parallel layout, with greedy outputs; loaded once."""

    @cache
    def load(family, tp_size, ep_size):
        job = LoadJob(checkpoint(family), streaming="0", tp_size=tp_size, ep_size=ep_size, prompts=PROMPTS)
        return workers.load(job)

    return load


@pytest.fixture
def stream(workers, checkpoint, tmp_path):
    """A streaming load."""

    def load(family, variant, tp_size=1, ep_size=1, **fields):
        job = LoadJob(
            checkpoint(family, **variant.files),
            tp_size=tp_size,
            ep_size=ep_size,
            environ=variant.environ,
            loader_config=variant.loader_config,
            **fields,
        )
        return load_streamed(workers.load, job, tmp_path)

    return load


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_and_greedy_outputs_equal_stock(family, tp_size, stock, stream):
    result = stream(family, Variant(files=MANY), tp_size=tp_size, prompts=PROMPTS)
    assert compare(stock(family, tp_size, 1), result) == []
    assert result.tokens


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_any_layout_on_disk_gives_stock_weights(family, variant, stock, stream):
    result = stream(family, VARIANTS[variant])
    assert compare(stock(family, 1, 1), result) == []


@pytest.mark.parametrize("variant", ["files staggered by rank", "tensors and files shuffled"])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3"])
def test_any_layout_on_disk_gives_stock_weights_on_two_ranks(family, variant, stock, stream):
    result = stream(family, VARIANTS[variant], tp_size=2)
    assert compare(stock(family, 2, 1), result) == []


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_expert_parallel_gives_stock_weights_and_outputs(family, stock, stream):
    result = stream(family, Variant(files=MANY), tp_size=2, ep_size=2, prompts=PROMPTS)
    assert compare(stock(family, 2, 2), result) == []
