# SPDX-License-Identifier: Apache-2.0
"""The KV cache's dtype is the user's own choice, beside streaming as without it."""

from __future__ import annotations

import pytest
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, compare


@pytest.mark.parametrize("scheme", ["stock", "block"])
def test_fp8_kv_cache_is_left_as_the_user_sets_it(scheme, workers, checkpoint):
    sizes = (("intermediate_size", 512),)
    path = checkpoint("qwen3", overrides=sizes)
    stored = path if scheme == "stock" else checkpoint("qwen3", overrides=sizes, stored="fp8_block")
    fp8 = {"prompts": PROMPTS, "server_args": {"kv_cache_dtype": "fp8_e4m3"}}
    environ = {"SGLANG_STREAMFP8_SCHEME": scheme}
    streamed = workers.load(LoadJob(path, environ=environ, **fp8))
    assert compare(workers.load(LoadJob(stored, streaming="0", **fp8)), streamed) == []
    with_bf16_cache = workers.load(LoadJob(path, environ=environ, prompts=PROMPTS))
    assert with_bf16_cache.ranks[0].logits_sha256 != streamed.ranks[0].logits_sha256
