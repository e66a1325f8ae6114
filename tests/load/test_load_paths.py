# SPDX-License-Identifier: Apache-2.0
"""However SGLang is told to read and place weights, streaming serves what stock does, or says why it cannot stream."""

from __future__ import annotations

import math

import pytest
from harness.mutations import without_shared_keys_and_values
from harness.streamed import assert_streamed, warnings_of
from workbench.loads.loads import PROMPTS, compare
from workbench.quality import families

from sglang_overlay.hooks import releases, source_tree

MANY = {"files": 7, "assignment": "round_robin"}


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("options", [{}, {"weight_loader_disable_mmap": True}], ids=["mmap", "no mmap"])
def test_threads_and_mapping_do_not_matter(options, threads, both, checkpoint):
    config = {"enable_multithread_load": threads > 1, "num_threads": threads}
    stock, result, reports = both(checkpoint("deepseek_v3", **MANY), loader_config=config, server_args=options)
    assert compare(stock, result) == []
    assert_streamed(reports)
    # While it reads, streaming has torch compute with one thread each.
    assert result.ranks[0].torch_threads == stock.ranks[0].torch_threads > 1


@pytest.mark.parametrize(
    "options",
    [{"weight_loader_prefetch_checkpoints": True}, {"weight_loader_drop_cache_after_load": True}],
    ids=["prefetch", "drop cache"],
)
@pytest.mark.parametrize("config", [{}, {"num_threads": 2}], ids=["default threads", "two threads"])
def test_page_cache_options_do_not_matter(config, options, both, checkpoint):
    stock, result, reports = both(checkpoint("qwen3_moe", **MANY), loader_config=config, server_args=options)
    assert compare(stock, result) == []
    assert_streamed(reports)


# -- placing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_pipeline_stages_stream(family, both, checkpoint):
    stock, result, reports = both(checkpoint(family, **MANY), pp_size=2)
    assert compare(stock, result) == []
    assert_streamed(reports, 2)
    assert sorted(report.ranks.pp.rank for report in reports) == [0, 1]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_data_parallel_attention_streams(family, both, checkpoint):
    options = {"enable_dp_attention": True, "dp_size": 2}
    stock, result, reports = both(checkpoint(family, **MANY), tp_size=2, server_args=options)
    assert compare(stock, result) == []
    assert_streamed(reports, 2)


def test_redundant_experts_stream_into_each_of_their_slots(both, checkpoint):
    options = {"ep_num_redundant_experts": 2}
    fields = {"tp_size": 2, "ep_size": 2, "server_args": options, "prompts": PROMPTS}
    stock, result, reports = both(checkpoint("qwen3_moe", **MANY), **fields)
    assert compare(stock, result) == []
    assert_streamed(reports, 2)
    assert {result.ranks[0].tensors["model.layers.0.mlp.experts.w13_weight"].shape[0]} == {5}


def test_offloaded_weights_load_as_stock_with_one_warning(both, checkpoint):
    options = {"cpu_offload_gb": 1}
    stock, result, reports = both(checkpoint("qwen3_moe"), streaming="1", server_args=options, prompts=PROMPTS)
    assert compare(stock, result) == []
    assert [report.mode for report in reports] == ["stock"]
    (warning,) = warnings_of(result)
    assert "--cpu-offload-gb" in warning


# -- models ----------------------------------------------------------------------------------------------------------


def test_tied_embeddings_stream(both, checkpoint):
    stock, result, reports = both(checkpoint("qwen3", tied_embeddings=True), prompts=PROMPTS)
    assert compare(stock, result) == []
    assert_streamed(reports)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])
def test_weight_loader_v2_streams(architecture, both, checkpoint_folder):
    """Releases before 0.5.22 have none, and load as ever."""
    path = families.build(architecture, checkpoint_folder)
    stock, result, reports = both(path, environ={"SGLANG_ENABLE_WEIGHT_LOADER_V2": "1"})
    assert compare(stock, result) == []
    assert_streamed(reports)


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param("GptOssForCausalLM", id="experts in one tensor, with biases"),
        pytest.param("Llama4ForConditionalGeneration", id="experts in one tensor, transposed, gate and up fused"),
        pytest.param("Qwen3_5MoeForConditionalGeneration", id="vision tower, experts in one tensor, own loaders"),
        pytest.param("Qwen2_5_VLForConditionalGeneration", id="vision tower"),
        pytest.param("GPT2LMHeadModel", id="transposed layers with biases"),
        pytest.param("MistralModel", id="embedding model"),
        pytest.param("LlamaForSequenceClassification", id="classifier"),
    ],
)
def test_model_streams(architecture, both, checkpoint_folder):
    path = families.build(architecture, checkpoint_folder)
    stock, result, reports = both(path, uninitialized=math.nan, server_args=families.server_args(architecture))
    assert compare(stock, result) == []
    assert_streamed(reports)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_models_of_transformers_stream(family, both, checkpoint):
    allocating = "sglang.srt.models.transformers.TransformersBase._init_parameters"
    if family == "qwen3_moe" and "get_device" not in source_tree.find(releases.root(), allocating).text:
        pytest.skip("this release has the weights of routers on a GPU")
    stock, result, reports = both(checkpoint(family), server_args={"model_impl": "transformers"}, prompts=PROMPTS)
    assert compare(stock, result) == []
    assert_streamed(reports)
    assert any(name.endswith("self_attn.q_proj.weight") for name in result.ranks[0].tensors)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_multi_token_prediction_layer_streams_as_a_draft(tp_size, both, checkpoint):
    path = checkpoint("deepseek_v3", overrides=(("num_nextn_predict_layers", 1),))
    # Embeddings and head are the target's: what the draft has of its own is never written.
    stock, result, reports = both(path, draft=path, tp_size=tp_size, uninitialized=math.nan)
    assert compare(stock, result) == []
    assert_streamed(reports, tp_size)
    assert {report.role for report in reports} == {"draft"}


@pytest.mark.parametrize("tp_size", [1, 2])
def test_multi_token_prediction_layer_that_the_target_skips_is_not_missing(tp_size, both, checkpoint):
    path = checkpoint("deepseek_v3", overrides=(("num_nextn_predict_layers", 1),))
    stock, result, reports = both(path, tp_size=tp_size)
    assert compare(stock, result) == []
    assert_streamed(reports, tp_size)


def test_experts_without_a_gate_stream(both, checkpoint_folder):
    """The CPU reference cannot run them: the weights alone are compared."""
    path = families.build("NemotronHForCausalLM", checkpoint_folder)
    stock, result, reports = both(path, uninitialized=math.nan)
    assert compare(stock, result) == []
    assert_streamed(reports)
    experts = result.ranks[0].tensors["model.layers.1.mixer.experts.w13_weight"]
    assert (experts.dtype, experts.shape) == ("torch.float8_e4m3fn", (4, 96, 128))


def test_draft_model_of_its_own_streams(both, checkpoint):
    path, draft = checkpoint("qwen3"), checkpoint("qwen3", overrides=(("num_hidden_layers", 1),))
    stock, result, reports = both(path, draft=draft)
    assert compare(stock, result) == []
    assert_streamed(reports)
    assert reports[0].layers.streamed == 4


def test_embedding_model_streams(both, checkpoint):
    stock, result, reports = both(checkpoint("qwen3"), server_args={"is_embedding": True})
    assert compare(stock, result) == []
    assert_streamed(reports)


def test_keys_and_values_that_no_layer_uses_may_lack(both, checkpoint_folder, tmp_path):
    path = without_shared_keys_and_values(checkpoint_folder, tmp_path / "gemma4")
    stock, result, _ = both(path, uninitialized=0.0)
    assert compare(stock, result) == []
    assert any("that nothing uses" in line for line in result.log)
    (warning,) = warnings_of(result)
    assert "k_norm" in warning
