# SPDX-License-Identifier: Apache-2.0
"""What cannot be streamed takes stock's path with one warning, or stops with an error; it never differs in silence."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import pytest
import transformers
from harness.mutations import altered
from harness.streamed import warnings_of
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, LoadFailed, compare
from workbench.loads.updates import Update
from workbench.quality import families


@pytest.fixture
def both_of(both, odd_workers, checkpoint):
    """Stock and streaming loads of a misbehaving model, and the streaming load's report."""

    def load(architecture):
        path = checkpoint("qwen3", overrides=(("architectures", (architecture,)),))
        stock, result, (report,) = both(path, streaming="1", workers=odd_workers, prompts=PROMPTS)
        return stock, result, report

    return load


UNBUILDABLE = {
    "RepackingForCausalLM": "repacked while the model is built, into packed, which the model keeps in high precision",
    "ReadingInInitForCausalLM": "building it with placeholders fails",
    "LoaderlessForCausalLM": "building it with placeholders fails",
}
"""Architectures that only build without placeholders, and what is said of them."""


@pytest.mark.parametrize("architecture", UNBUILDABLE)
def test_model_that_needs_its_weights_while_it_is_built_loads_as_stock(architecture, both_of):
    stock, result, report = both_of(architecture)
    assert compare(stock, result) == []
    assert report.mode == "stock"
    (warning,) = warnings_of(result)
    assert architecture in warning
    assert UNBUILDABLE[architecture] in warning


def test_experts_that_a_model_packs_are_in_memory_twice_in_stock(both, checkpoint_folder):
    """And in bf16 they serve: deepseek.py, afmoe.py and xverse_moe.py end with more than they begin with."""
    if not hasattr(transformers, "AfmoeForCausalLM"):
        pytest.skip("this release of transformers does not have the model")
    stock, result, (report,) = both(families.build("AfmoeForCausalLM", checkpoint_folder), streaming="1")
    assert compare(stock, result) == []
    assert report.mode == "stock"
    tensors = stock.ranks[0].tensors
    (layer,) = {name.partition(".w1")[0] for name in tensors if name.endswith(".mlp.w1")}
    assert tensors[f"{layer}.w1"].dtype == "torch.bfloat16"
    assert tensors[f"{layer}.experts.0.gate_up_proj.weight"].dtype == "torch.float8_e4m3fn"


def test_part_that_is_moved_while_the_model_is_built_streams(both_of):
    stock, result, report = both_of("MovingForCausalLM")
    assert compare(stock, result) == []
    assert report.layers.fallback == ()
    assert report.layers.streamed == 12
    assert warnings_of(result) == []


def test_layer_with_an_unforeseen_loader_loads_as_stock_and_the_others_stream(both_of):
    stock, result, report = both_of("AddingLoaderForCausalLM")
    assert compare(stock, result) == []
    assert report.mode == "streaming"
    assert [note.layer for note in report.layers.fallback] == ["model.layers.1.mlp.down_proj"]
    assert report.layers.streamed == 11
    assert len(warnings_of(result)) == 1
    assert "model.layers.1.mlp.down_proj" in warnings_of(result)[0]
    assert "add_" in warnings_of(result)[0]


def test_layer_of_which_a_part_came_before_it_went_back_to_stock_loads_as_in_stock(both_of):
    stock, result, report = both_of("FusedAddingLoaderForCausalLM")
    assert compare(stock, result) == []
    assert [note.layer for note in report.layers.fallback] == ["model.layers.1.mlp.gate_up_proj"]


def test_part_that_is_missing_of_a_layer_that_went_back_to_stock_is_named(odd_workers, checkpoint, tmp_path):
    lost = "model.layers.1.mlp.up_proj.weight"
    whole = checkpoint("qwen3", overrides=(("architectures", ("FusedAddingLoaderForCausalLM",)),))
    path = altered(whole, tmp_path / "damaged", lambda tensors: tensors.pop(lost))
    with pytest.raises(LoadFailed, match=rf"model\.layers\.1\.mlp\.gate_up_proj\.weight .*missing {lost}"):
        odd_workers.load(LoadJob(path, streaming="1"))


def test_loader_of_the_models_own_streams(both_of):
    stock, result, report = both_of("CustomLoaderForCausalLM")
    assert compare(stock, result) == []
    assert report.layers.fallback == ()
    assert report.layers.streamed == 12


def test_source_that_is_overwritten_after_its_loader_returned_does_no_harm(both_of):
    stock, result, report = both_of("ReusedBufferForCausalLM")
    assert compare(stock, result) == []
    assert report.layers.fallback == ()
    assert report.layers.streamed == 12


def test_layer_that_is_quantized_when_its_loader_does_something_unforeseen_is_loaded_anew(both_of):
    stock, result, report = both_of("LateAddingLoaderForCausalLM")
    assert compare(stock, result) == []
    assert report.mode == "streaming"
    assert [note.layer for note in report.layers.fallback] == ["model.layers.1.mlp.down_proj"]
    assert report.layers.streamed == 11
    assert len(warnings_of(result)) == 1
    assert "loaded anew" in warnings_of(result)[0]


LATE = {
    "ManyLateAddingLoadersForCausalLM": ("qwen3", [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]),
    "LateAddingExpertsForCausalLM": ("qwen3_moe", [f"model.layers.{layer}.mlp.experts" for layer in (1, 2)]),
}
"""Architectures of which several layers turn out late, and these."""


@pytest.mark.parametrize("architecture", LATE)
def test_any_number_of_layers_that_turn_out_late_are_loaded_anew_and_the_others_stream(
    architecture, odd_workers, both, checkpoint
):
    family, late = LATE[architecture]
    path = checkpoint(family, overrides=(("architectures", (architecture,)),))
    stock, result, (report,) = both(path, streaming="1", workers=odd_workers, prompts=PROMPTS)
    assert compare(stock, result) == []
    assert report.mode == "streaming"
    assert [note.layer for note in report.layers.fallback] == late
    assert report.layers.streamed == (12 if family == "qwen3" else 9) - len(late)
    told = "is loaded as in stock SGLang: .*; the model was loaded anew"
    assert all(re.search(rf"{layer} {told}", line) for layer, line in zip(late, warnings_of(result), strict=True))


@pytest.mark.parametrize(("quantization", "mode"), [("fp8", "streaming"), (None, "stock")])
def test_tensors_that_a_model_leaves_without_memory_are_no_matter(quantization, mode, both, odd_workers, checkpoint):
    path = checkpoint("qwen3", overrides=(("architectures", ("LeavingTensorsWithoutMemoryForCausalLM",)),))
    stock, result, (report,) = both(path, workers=odd_workers, quantization=quantization)
    assert compare(stock, result) == []
    assert result.ranks[0].tensors["described"].sha256 == "meta"
    assert report.mode == mode
    assert warnings_of(result) == []


def test_tensors_on_the_device_of_a_weight_have_memory(both_of):
    stock, result, report = both_of("FollowingAWeightForCausalLM")
    assert compare(stock, result) == []
    assert stock.ranks[0].tensors["cache"].sha256 != "meta"
    assert report.mode == "stock"
    (warning,) = warnings_of(result)
    assert "cache" in warning


@pytest.mark.parametrize("architecture", ["LateAndWatchedForCausalLM", "ConvertingAndWatchedForCausalLM"])
def test_first_model_is_gone_when_it_is_loaded_anew(architecture, both_of):
    stock, result, _ = both_of(architecture)
    assert compare(stock, result) == []
    assert "loaded anew" in warnings_of(result)[0]


def test_layer_that_a_model_deletes_after_reading_it_is_gone(both, odd_workers, checkpoint_folder, tmp_path):
    if not hasattr(transformers, "MiniCPM3ForCausalLM"):
        pytest.skip("this release of transformers does not have the model")
    shutil.copytree(families.build("MiniCPM3ForCausalLM", checkpoint_folder), tmp_path / "watched")
    config = tmp_path / "watched/config.json"
    config.write_text(config.read_text().replace('"MiniCPM3ForCausalLM"', '"WatchedMiniCPM3ForCausalLM"'))
    stock, result, (report,) = both(tmp_path / "watched", workers=odd_workers)
    # The number of deleted layers' weights that are in memory is among what is compared.
    assert compare(stock, result) == []
    assert "deleted[0]" in result.ranks[0].tensors
    assert report.layers.fallback == ()


def test_layer_that_a_model_deletes_is_named_where_its_weight_is_missing(workers, checkpoint_folder, tmp_path):
    if not hasattr(transformers, "MiniCPM3ForCausalLM"):
        pytest.skip("this release of transformers does not have the model")
    lost = "model.layers.1.self_attn.kv_b_proj.weight"
    whole = families.build("MiniCPM3ForCausalLM", checkpoint_folder)
    path = altered(whole, tmp_path / "damaged", lambda tensors: tensors.pop(lost))
    with pytest.raises(LoadFailed, match=rf"{lost} .*: missing {lost}"):
        workers.load(LoadJob(path))


def test_experts_that_a_model_notes_down_too_early_are_noted_again(odd_workers, checkpoint):
    path = checkpoint("qwen3_moe", overrides=(("architectures", ("NotingExpertsForCausalLM",)),))
    stock, result = (odd_workers.load(LoadJob(path, streaming=mode)).ranks[0] for mode in ("0", "require"))
    for number, name in enumerate(["w13_weight", "w2_weight"]):
        noted, weight = f"routed_experts_weights_of_layer[2][{number}]", f"model.layers.2.mlp.experts.{name}"
        assert stock.tensors[noted].dtype == "torch.bfloat16"
        assert result.tensors[noted].sha256 == result.tensors[weight].sha256
    assert warnings_of(result) == []


def test_model_that_cannot_be_streamed_is_an_error_where_streaming_is_required(odd_workers, checkpoint):
    path = checkpoint("qwen3", overrides=(("architectures", ("ReadingAfterLoadingForCausalLM",)),))
    with pytest.raises(LoadFailed, match=r"SGLANG_STREAMFP8=require(.|\n)*clone\S* is applied to it"):
        odd_workers.load(LoadJob(path, streaming="require"))


@pytest.mark.parametrize("architecture", ["AddingLoaderForCausalLM", "LateAddingLoaderForCausalLM"])
def test_layer_that_cannot_be_streamed_is_an_error_where_streaming_is_required(architecture, odd_workers, checkpoint):
    path = checkpoint("qwen3", overrides=(("architectures", (architecture,)),))
    expected = (
        r"SGLANG_STREAMFP8=require, but this fp8 load cannot be streamed: model\.layers\.1\.mlp\.down_proj: .*add_"
    )
    with pytest.raises(LoadFailed, match=expected):
        odd_workers.load(LoadJob(path, streaming="require"))


def updated(odd_workers, checkpoint, architecture):
    paths = [checkpoint("qwen3", overrides=(("architectures", (architecture,)),), seed=seed) for seed in (0, 1)]
    fresh = odd_workers.load(LoadJob(paths[1], streaming="1"))
    result = odd_workers.load(LoadJob(paths[0], streaming="1", updates=(Update("disk", paths[1]),)))
    return fresh, result, result.ranks[0].updates[0]


@pytest.mark.parametrize("architecture", ["RepackingForCausalLM", "LoaderlessForCausalLM"])
def test_update_of_a_model_that_loaded_as_stock_warns_that_stock_cannot(architecture, odd_workers, checkpoint):
    _, result, done = updated(odd_workers, checkpoint, architecture)
    assert not done.success
    assert "stock SGLang quantized this model" in warnings_of(result)[-1]


@pytest.mark.parametrize("architecture", ["AddingLoaderForCausalLM", "CustomLoaderForCausalLM"])
def test_update_of_a_model_with_loaders_of_its_own_ends_as_a_fresh_load(architecture, odd_workers, checkpoint):
    fresh, result, done = updated(odd_workers, checkpoint, architecture)
    assert done.success, done.message
    assert done.moved == ()
    assert compare(fresh, result) == []


@pytest.mark.parametrize("architecture", ["BypassingForCausalLM", "BypassingInSlicesForCausalLM"])
def test_weights_written_without_their_loaders_stream(architecture, both_of):
    stock, result, report = both_of(architecture)
    assert compare(stock, result) == []
    assert report.layers.fallback == ()
    assert report.layers.streamed == 12
    assert report.warnings == ()
    assert warnings_of(result) == []


def test_weight_that_is_changed_without_its_loader_is_loaded_anew(both_of):
    stock, result, report = both_of("ScalingForCausalLM")
    assert compare(stock, result) == []
    assert [note.layer for note in report.layers.fallback] == ["model.layers.1.mlp.down_proj"]
    (warning,) = warnings_of(result)
    assert "mul_" in warning
    assert "loaded anew" in warning


def test_weight_that_is_replaced_while_it_is_loaded_is_loaded_anew(both_of):
    stock, result, report = both_of("ReplacingParameterForCausalLM")
    assert compare(stock, result) == []
    assert [note.layer for note in report.layers.fallback] == ["model.layers.1.mlp.down_proj"]
    (warning,) = warnings_of(result)
    assert "weight is replaced while the model is loaded" in warning


def test_weight_that_is_copied_while_the_model_is_loaded_is_loaded_anew(both_of):
    stock, result, report = both_of("CopyingAfterLoadingForCausalLM")
    assert compare(stock, result) == []
    assert [note.layer for note in report.layers.fallback] == ["model.layers.1.mlp.down_proj"]
    (warning,) = warnings_of(result)
    assert "copy_" in warning


READING = {
    "ReadingAfterLoadingForCausalLM": "clone",
    "CountingAfterLoadingForCausalLM": "abs",
    "CopyingWhatIsDerivedForCausalLM": "_to_copy",
}
"""Architectures that compute with a weight after it has been loaded, and the first operation."""


@pytest.mark.parametrize("architecture", READING)
def test_only_the_layer_whose_weight_is_read_is_loaded_anew(architecture, both_of):
    stock, result, report = both_of(architecture)
    assert compare(stock, result) == []
    assert [note.layer for note in report.layers.fallback] == ["model.layers.1.mlp.down_proj"]
    assert report.layers.streamed == 11
    (warning,) = warnings_of(result)
    assert READING[architecture] in warning
    assert "loaded anew" in warning


def test_layer_whose_weight_the_model_keeps_is_loaded_anew(both_of):
    stock, result, report = both_of("KeepingForCausalLM")
    assert compare(stock, result) == []
    assert [note.layer for note in report.layers.fallback] == ["model.layers.1.mlp.down_proj"]
    (warning,) = warnings_of(result)
    assert "the model keeps its weight as kept" in warning


def test_layers_whose_weights_are_joined_are_loaded_anew_and_told_of_once(both_of):
    stock, result, report = both_of("MergingForCausalLM")
    assert compare(stock, result) == []
    joined = ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_up_proj"]
    assert sorted(note.layer for note in report.layers.fallback) == joined
    assert report.layers.streamed == 10
    assert len(warnings_of(result)) == 2


def test_model_that_cannot_be_loaded_with_placeholders_is_loaded_anew_as_stock(both_of):
    stock, result, report = both_of("ReplacingDataForCausalLM")
    assert compare(stock, result) == []
    assert report.mode == "stock"
    (warning,) = warnings_of(result)
    assert "incompatible tensor type" in warning
    assert "loaded anew" in warning


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [("CopyingAfterLoadingForCausalLM", "copy_"), ("CountingAfterLoadingForCausalLM", "abs")],
)
def test_model_that_reads_weights_is_an_error_where_streaming_is_required(
    architecture, reason, odd_workers, checkpoint
):
    path = checkpoint("qwen3", overrides=(("architectures", (architecture,)),))
    with pytest.raises(LoadFailed, match=rf"SGLANG_STREAMFP8=require, but this fp8 load cannot be .*{reason}"):
        odd_workers.load(LoadJob(path, streaming="require"))


def test_error_of_a_models_own_ends_the_load_anew_too(odd_workers, checkpoint):
    path = checkpoint("qwen3", overrides=(("architectures", ("FailingAfterLoadingForCausalLM",)),))
    with pytest.raises(LoadFailed, match=r"RuntimeError: the sum is 0") as failed:
        odd_workers.load(LoadJob(path, streaming="1"))
    assert "without data" not in str(failed.value)


@pytest.mark.parametrize("stored", ["fp8", "fp8_block"])
def test_fp8_serialized_checkpoint_is_left_to_stock(stored, both, checkpoint):
    family = "qwen3" if stored == "fp8" else "qwen3_moe"
    stock, result, (report,) = both(checkpoint(family, stored=stored))
    assert compare(stock, result) == []
    assert report.mode == "stock"
    assert report.units.streamed == 0
    assert warnings_of(result) == []


def test_unquantized_load_is_left_to_stock(workers, checkpoint):
    path = checkpoint("qwen3_moe")
    stock = workers.load(LoadJob(path, streaming="0", quantization=None))
    result = workers.load(LoadJob(path, streaming="require", quantization=None))
    assert compare(stock, result) == []
    assert not [line for line in result.ranks[0].log if "StreamFP8" in line]


def test_ignored_layers_stay_in_high_precision(both, checkpoint):
    environ = {"SGLANG_FP8_IGNORED_LAYERS": "model.layers.0.mlp.experts,model.layers.1.self_attn.o_proj"}
    stock, result, (report,) = both(checkpoint("qwen3_moe"), streaming="1", environ=environ)
    assert compare(stock, result) == []
    assert report.layers.streamed == 7


def test_other_load_formats_load_as_stock_with_one_warning(workers, checkpoint):
    path = checkpoint("qwen3")
    job = LoadJob(path, server_args={"load_format": "flash_rl"})
    stock = workers.load(replace(job, streaming="0"))
    result = workers.load(job)
    assert compare(stock, result) == []
    assert len(warnings_of(result)) == 1
    assert "QuantizedRLModelLoader" in warnings_of(result)[0]


def test_flash_rl_updates_itself_and_is_not_warned_that_it_cannot(workers, checkpoint):
    job = LoadJob(checkpoint("qwen3"), server_args={"load_format": "flash_rl"})
    update = Update("tensor", checkpoint("qwen3", seed=1))
    stock = workers.load(replace(job, streaming="0", updates=(update,)))
    result = workers.load(replace(job, updates=(update,)))
    answers = [[done.success for done in loaded.ranks[0].updates] for loaded in (stock, result)]
    assert answers[0] == answers[1]
    assert compare(stock, result) == []
    assert not [line for line in warnings_of(result) if "cannot update" in line]


def test_other_load_formats_are_an_error_where_streaming_is_required(workers, checkpoint):
    path = checkpoint("qwen3")
    with pytest.raises(LoadFailed, match=r"SGLANG_STREAMFP8=require.*QuantizedRLModelLoader"):
        workers.load(LoadJob(path, streaming="require", server_args={"load_format": "flash_rl"}))
