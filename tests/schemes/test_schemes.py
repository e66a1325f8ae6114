# SPDX-License-Identifier: Apache-2.0
"""A scheme of the user's choice: what SGLang has after loading a checkpoint that was quantized that way beforehand."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness.streamed import assert_streamed, load_reported, warnings_of
from safetensors.torch import load_file
from workbench.loads.fingerprints import hash_of
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, STORED_AS_FP8, LoadFailed, LoadWorkers, compare
from workbench.loads.updates import Update
from workbench.quality import families

from sglang_overlay.hooks import scheme_hooks
from sglang_overlay.schemes.arithmetic import quantize_rows
from sglang_overlay.schemes.int8 import Int8RowQuantizer

HERE = Path(__file__).parent
BLOCKS = (("hidden_size", 256), ("intermediate_size", 512), ("moe_intermediate_size", 128))
"""Sizes that divide into blocks of 128."""

MLA = (*BLOCKS, ("q_lora_rank", 128))
SHARED = (*BLOCKS, ("shared_expert_intermediate_size", 256))
FAMILIES = {"qwen3": BLOCKS, "qwen2_moe": SHARED, "qwen3_moe": BLOCKS, "deepseek_v3": MLA}
MANY = {"files": 5, "assignment": "shuffled"}
SESSIONS = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.begin_weight_update"
FUSED = {"output_partition_sizes": [96, 32], "output_size": 256, "input_size": 96, "input_size_per_partition": 96}
SPLIT = {"output_partition_sizes": [256], "output_size": 256}
"""What ``create_weights`` gets for a linear layer over two ranks that splits rows, or columns."""
TENSOR_BY_TENSOR = pytest.param(
    {"source": "tensor", "calls": 7, "order": "shuffled"}, marks=pytest.mark.needs(SESSIONS), id="calls"
)


@pytest.fixture
def load(workers, tmp_path):
    """Load a checkpoint under a choice of schemes; the result, and the reports."""

    def run(path, scheme, **fields):
        job = LoadJob(path, environ={"SGLANG_STREAMFP8_SCHEME": scheme}, prompts=PROMPTS, **fields)
        return load_reported(workers.load, job, tmp_path / "reports")

    return run


def stock(workers, path, **fields):
    return workers.load(LoadJob(path, streaming="0", prompts=PROMPTS, **fields))


def differences(one, other, *ignored):
    """What ``compare`` finds, but for tensors of which the name contains one of ``ignored``."""
    return [line for line in compare(one, other) if not any(name in line for name in ignored)]


@pytest.mark.parametrize("family", ["qwen3", "qwen2_moe", "qwen3_moe"])
def test_block_is_what_stock_has_after_loading_a_block_fp8_checkpoint(family, workers, load, checkpoint):
    serialized = stock(workers, checkpoint(family, stored="fp8_block", overrides=FAMILIES[family]))
    result, reports = load(checkpoint(family, overrides=FAMILIES[family], **MANY), "block")
    assert compare(serialized, result) == []
    assert_streamed(reports)
    assert reports[0].scheme == "block"


def test_block_leaves_mla_its_absorbed_weight_in_bf16(workers, load, checkpoint):
    path = checkpoint("deepseek_v3", stored="fp8_block", overrides=MLA)
    serialized = workers.load(LoadJob(path, streaming="0"))
    result, reports = load(checkpoint("deepseek_v3", overrides=MLA, **MANY), "block")
    weights = {name: tensor for name, tensor in result.ranks[0].tensors.items() if "kv_b_proj.weight" in name}
    assert {tensor.dtype for tensor in weights.values()} == {str(torch.bfloat16)}
    mla = ("kv_b_proj", "w_kc", "w_vc", "w_scale", "parameter order", "model_bytes", "logits", "tokens")
    assert differences(serialized, result, *mla, *STORED_AS_FP8) == []
    assert_streamed(reports)


def test_block_over_two_ranks(workers, load, checkpoint):
    sizes = (*BLOCKS, ("head_dim", 128))
    serialized = stock(workers, checkpoint("qwen3", stored="fp8_block", overrides=sizes), tp_size=2)
    result, reports = load(checkpoint("qwen3", overrides=sizes, **MANY), "block", tp_size=2)
    assert compare(serialized, result) == []
    assert_streamed(reports, 2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["channel", "tensor"])
def test_forced_granularity_streams_and_generates(scheme, family, load, checkpoint):
    result, reports = load(checkpoint(family, **MANY), scheme)
    assert result.ranks[0].logits_finite
    assert_streamed(reports)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "deepseek_v3"])
def test_int8_experts_stream_and_generate(family, load, checkpoint):
    result, reports = load(checkpoint(family, **MANY), '{"moe": "int8"}')
    dtypes = {tensor.dtype for name, tensor in result.ranks[0].tensors.items() if "experts.w13_weight" in name}
    assert dtypes == {str(torch.int8), str(torch.float32)}
    assert result.ranks[0].logits_finite
    assert_streamed(reports)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_tensor_is_stocks_own_choice_without_a_gpu(family, workers, load, checkpoint):
    path = checkpoint(family, **MANY)
    result, _ = load(path, "tensor")
    assert compare(stock(workers, path), result) == []


def test_stock_is_the_default(workers, load, checkpoint):
    path = checkpoint("qwen3_moe", **MANY)
    result, reports = load(path, "stock")
    assert compare(stock(workers, path), result) == []
    assert_streamed(reports)


def test_schemes_are_chosen_by_kind_of_layer_and_by_name(load, checkpoint):
    choice = {
        "linear": "channel",
        "moe": "block",
        "ignore": ["re:.*layers.0.self_attn.o_proj"],
        "overrides": {"model.layers.1.self_attn.qkv_proj": "tensor"},
    }
    result, reports = load(checkpoint("qwen3_moe", overrides=BLOCKS, **MANY), json.dumps(choice))
    tensors = result.ranks[0].tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert tensors["model.layers.0.self_attn.o_proj.weight"].dtype == str(torch.bfloat16)
    assert shapes["model.layers.1.self_attn.qkv_proj.weight_scale"] == ()
    assert shapes["model.layers.0.self_attn.qkv_proj.weight_scale"] == (1, 512)
    assert shapes["model.layers.0.mlp.experts.w13_weight_scale_inv"] == (8, 2, 2)
    assert result.ranks[0].logits_finite
    assert_streamed(reports)


def test_parts_of_a_fused_layer_go_by_the_checkpoints_names(load, checkpoint):
    choice = {"linear": "channel", "ignore": ["q_proj", "k_proj", "v_proj"], "overrides": {}}
    path = checkpoint("qwen3", **MANY)
    with pytest.raises(LoadFailed, match=r"'q_proj' matches .*q_proj, but .*qkv_proj is one layer of it"):
        load(path, json.dumps(choice))
    result, _ = load(path, json.dumps({**choice, "ignore": [r"re:.*\.[qkv]_proj"]}))
    assert result.ranks[0].tensors["model.layers.0.self_attn.qkv_proj.weight"].dtype == str(torch.bfloat16)


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("blocks", "no quantization scheme 'blocks'. Use one of: stock, tensor, channel, block, int8, none"),
        ('{"linear": "block", "ignore": ["lm_heat"]}', "the pattern 'lm_heat' matches no layer"),
        ("int8", "cannot have the quantization scheme 'int8': SGLang has no kernel for it"),
        ('{"experts": "block"}', "no key 'experts'. Its keys are linear, moe, ignore, overrides"),
    ],
)
def test_slip_of_the_pen_stops_the_load(scheme, said, load, checkpoint):
    with pytest.raises(LoadFailed, match=re.escape(said)):
        load(checkpoint("qwen3", **MANY), scheme)


def test_what_is_never_quantized_may_be_ignored(load, checkpoint):
    """The example that the documentation gives."""
    page = (HERE.parents[1] / "docs" / "schemes.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"SGLANG_STREAMFP8_SCHEME='(\{\"linear\".*\})' *$", page, re.MULTILINE)
    assert "lm_head" in json.loads(example)["ignore"]
    result, reports = load(checkpoint("qwen3_moe", overrides=BLOCKS, **MANY), example)
    assert_streamed(reports)
    assert result.ranks[0].tensors["model.layers.0.self_attn.o_proj.weight_scale"].shape in ((), (1,))


def test_pattern_for_another_pipeline_stage_is_a_warning(workers, checkpoint):
    choice = {"linear": "channel", "overrides": {"layers.0.mlp.down_proj": "none"}}
    environ = {"SGLANG_STREAMFP8_SCHEME": json.dumps(choice)}
    result = workers.load(LoadJob(checkpoint("qwen3", **MANY), environ=environ, pp_size=2))
    said = ["'layers.0.mlp.down_proj' matches no layer" in "".join(rank.log) for rank in result.ranks]
    assert said == [False, True]
    assert result.ranks[0].tensors["model.layers.0.mlp.down_proj.weight"].dtype == str(torch.bfloat16)


@pytest.mark.parametrize(("quantization", "stored"), [(None, "bf16"), ("fp8", "fp8")])
def test_scheme_where_nothing_is_quantized_is_a_warning(quantization, stored, workers, checkpoint):
    environ = {"SGLANG_STREAMFP8_SCHEME": "block"}
    path = checkpoint("qwen3", stored=stored)
    log = workers.load(LoadJob(path, streaming="1", quantization=quantization, environ=environ)).ranks[0].log
    assert [line for line in log if "SGLANG_STREAMFP8_SCHEME=block chooses nothing here" in line]


@pytest.fixture
def workers_with_another_package(tmp_path_factory):
    """Workers in which a package with a scheme of its own is installed."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(HERE / "third_party" / "power_of_two.py", site)
    described = site / "power_of_two-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: power-of-two\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[sglang_streamfp8.schemes]\npow2 = power_of_two:POWER_OF_TWO\n")
    with pytest.MonkeyPatch.context() as patch:
        # A process gets its parent's sys.path.
        patch.syspath_prepend(str(site))
        with LoadWorkers(tmp_path_factory.mktemp("loads")) as group:
            yield group


def test_another_package_brings_a_scheme(workers_with_another_package, checkpoint):
    environ = {"SGLANG_STREAMFP8_SCHEME": "pow2"}
    path = checkpoint("qwen3_moe", overrides=BLOCKS, **MANY)
    result = workers_with_another_package.load(LoadJob(path, streaming="1", environ=environ, prompts=PROMPTS))
    assert "model.layers.0.mlp.experts.w13_weight_scale_inv" in result.ranks[0].tensors
    assert result.ranks[0].logits_finite
    assert any("scheme: pow2" in line for line in result.log)


def test_layer_that_cannot_be_streamed_is_quantized_whole_by_the_same_scheme(odd_workers, load, checkpoint):
    fields = {"overrides": (*BLOCKS, ("architectures", ("AddingLoaderForCausalLM",)))}
    environ = {"SGLANG_STREAMFP8_SCHEME": "block"}
    result = odd_workers.load(LoadJob(checkpoint("qwen3", **fields), environ=environ, prompts=PROMPTS))
    streamed, _ = load(checkpoint("qwen3", overrides=BLOCKS), "block")
    assert differences(streamed, result) == []
    (warning,) = warnings_of(result)
    assert "model.layers.1.mlp.down_proj" in warning
    assert "as in stock" not in warning


@pytest.mark.parametrize("scheme", ["block", "channel"])
@pytest.mark.parametrize(
    ("architecture", "family", "late"),
    [("ManyLateAddingLoadersForCausalLM", "qwen3", 3), ("LateAddingExpertsForCausalLM", "qwen3_moe", 2)],
)
def test_any_number_of_layers_that_turn_out_late_are_quantized_whole(
    architecture, family, late, scheme, odd_workers, load, checkpoint
):
    path = checkpoint(family, overrides=(*BLOCKS, ("architectures", (architecture,))))
    result = odd_workers.load(LoadJob(path, environ={"SGLANG_STREAMFP8_SCHEME": scheme}, prompts=PROMPTS))
    streamed, _ = load(checkpoint(family, overrides=BLOCKS), scheme)
    assert compare(streamed, result) == []
    assert ["the model was loaded anew" in line for line in warnings_of(result)] == [True] * late


@pytest.mark.parametrize("scheme", ["block", '{"linear": "channel", "moe": "int8"}'])
def test_update_ends_as_a_fresh_load(scheme, workers, load, checkpoint):
    old, new = (checkpoint("qwen3_moe", overrides=BLOCKS, seed=seed) for seed in (0, 1))
    fresh, _ = load(new, scheme)
    updated, _ = load(old, scheme, updates=(Update("disk", new),))
    assert [(update.success, update.moved) for update in updated.ranks[0].updates] == [(True, ())]
    assert compare(fresh, updated) == []


@pytest.mark.parametrize(("ep_size", "divided"), [(1, "columns"), (2, "experts")])
def test_int8_experts_over_two_ranks_have_the_values_and_scales_of_whole_rows(ep_size, divided, load, checkpoint):
    path = checkpoint("qwen3_moe", overrides=BLOCKS)
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.1.mlp.experts"
    whole = torch.stack([tensors[f"{name}.{expert}.down_proj.weight"] for expert in range(8)])
    values, scales = torch.empty(whole.shape, dtype=torch.int8), torch.empty(8, whole.shape[1])
    Int8RowQuantizer().quantize_run(whole, values, scales)
    result, reports = load(path, '{"moe": "int8"}', tp_size=2, ep_size=ep_size)
    assert_streamed(reports, 2)
    parts = (values.chunk(2, dim=2), (scales, scales)) if divided == "columns" else (values.chunk(2), scales.chunk(2))
    for rank, part, scale in zip(result.ranks, *parts, strict=True):
        assert rank.tensors[f"{name}.w2_weight"].sha256 == hash_of(part)
        assert rank.tensors[f"{name}.w2_weight_scale"].sha256 == hash_of(scale)


@pytest.mark.parametrize("calls", [{"source": "disk"}, {"source": "bucket"}, TENSOR_BY_TENSOR])
@pytest.mark.parametrize("scheme", ["channel", '{"linear": "channel", "moe": "int8"}'])
def test_update_of_two_ranks_ends_as_a_fresh_load(scheme, calls, load, checkpoint):
    old, new = (checkpoint("qwen3_moe", overrides=BLOCKS, seed=seed) for seed in (0, 1))
    fresh, reports = load(new, scheme, tp_size=2)
    assert_streamed(reports, 2)
    updated, _ = load(old, scheme, updates=(Update(checkpoint=new, **calls),), tp_size=2)
    assert [rank.updates[0].success for rank in updated.ranks] == [True, True]
    assert compare(fresh, updated) == []


class TestRowsThatAreNotSeenWhole:
    """Scales then are of a rank's columns: that is said of each such layer."""

    NARROWED = "model.layers.1.mlp.down_proj"

    def path(self, checkpoint, architecture, **fields):
        return checkpoint("qwen3", overrides=(*BLOCKS, ("architectures", (architecture,))), **fields)

    def test_loader_that_gets_some_columns_is_named(self, odd_workers, checkpoint):
        path = self.path(checkpoint, "NarrowingForCausalLM")
        job = LoadJob(path, environ={"SGLANG_STREAMFP8_SCHEME": "channel"}, tp_size=2)
        for rank in odd_workers.load(job).ranks:
            (warning,) = warnings_of(rank)
            assert f"weight loaders of {self.NARROWED}.weight were given some columns" in warning
        with pytest.raises(LoadFailed, match=rf"{self.NARROWED}\.weight were given some columns"):
            odd_workers.load(replace(job, streaming="require"))
        assert warnings_of(odd_workers.load(replace(job, tp_size=1))) == []

    def test_update_of_such_a_layer_names_it(self, odd_workers, checkpoint):
        old, new = (self.path(checkpoint, "NarrowingForCausalLM", seed=seed) for seed in (0, 1))
        job = LoadJob(new, environ={"SGLANG_STREAMFP8_SCHEME": "channel"}, tp_size=2, prompts=PROMPTS)
        updated = odd_workers.load(replace(job, checkpoint=old, updates=(Update("disk", new),)))
        named = [line for line in warnings_of(updated.ranks[1]) if f"{self.NARROWED}.weight were given" in line]
        assert len(named) == 2
        assert compare(odd_workers.load(job), updated) == []

    def test_layers_that_are_quantized_whole_are_named(self, odd_workers, checkpoint):
        path = checkpoint("qwen3_moe", overrides=(*BLOCKS, ("architectures", ("LateAddingExpertsForCausalLM",))))
        job = LoadJob(path, environ={"SGLANG_STREAMFP8_SCHEME": '{"moe": "channel"}'}, tp_size=2)
        for tp_size, named in ((2, [True, True]), (1, [False, False])):
            result = odd_workers.load(replace(job, tp_size=tp_size))
            for rank in result.ranks:
                found = ["whole, with scales of this rank's columns alone" in line for line in warnings_of(rank)]
                assert found == named


@pytest.mark.parametrize(
    ("sizes", "tp_size", "layer", "advice"),
    [
        ({"moe_intermediate_size": 192}, 1, "mlp.experts", "No tensor parallel size helps. Give"),
        ({"moe_intermediate_size": 192, "head_dim": 128}, 2, "mlp.experts", "No tensor parallel size helps. Give"),
        ({"head_dim": 128}, 2, "mlp.experts", "Use --tp-size 1. Or: Give"),
        ({"head_dim": 96}, 1, "self_attn.qkv_proj", "No tensor parallel size helps. Give"),
        ({"head_dim": 64}, 2, "self_attn.qkv_proj", "Use --tp-size 1. Or: Give"),
    ],
)
def test_layer_that_does_not_divide_into_blocks_is_named_with_what_helps(
    sizes, tp_size, layer, advice, load, checkpoint
):
    path = checkpoint("qwen3_moe", overrides=tuple({**dict(BLOCKS), **sizes}.items()))
    with pytest.raises(LoadFailed) as failure:
        load(path, "block", tp_size=tp_size)
    last = layer.rpartition(".")[2]
    told = re.search(rf"model.layers.0.{layer} as 'block': (.*) is not divisible by .* = 128. (.*)", str(failure.value))
    assert told
    assert told[2].startswith(advice)
    assert told[2].endswith(f'or leave them in bf16 with "ignore": ["{last}"].')
    choice = json.loads(re.search(r"SGLANG_STREAMFP8_SCHEME='(.*)'", told[2])[1])
    assert choice == {"linear": "block", "moe": "block", "overrides": {last: "channel"}}


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        ({**SPLIT, "input_size": 192, "input_size_per_partition": 96}, "Use --tp-size 1 or 3. Or: "),
        ({**SPLIT, "input_size": 96, "input_size_per_partition": 48}, "Use --tp-size 1. Or: "),
        (FUSED, "Use --tp-size 1 or 2 or 4 or 8 or 16 or 32 or 64. Or: "),
        ({"intermediate_size_per_partition": 128}, "Use --tp-size 1 or 2 or 4. Or: "),
        ({"intermediate_size_per_partition": 48}, "Use --tp-size 1. Or: "),
    ],
)
def test_advice_divides_rows_by_the_height_of_blocks_and_columns_by_their_width(call, advice):
    """Blocks of one row and 64 columns, as another package's scheme may have them."""
    method = SimpleNamespace(quant_config=SimpleNamespace(weight_block_size=[1, 64]))
    assert scheme_hooks._smaller_degrees(method, SimpleNamespace(moe_tp_size=2), call) == advice


def test_what_is_offered_in_place_of_blocks_loads(load, checkpoint):
    path = checkpoint("qwen3_moe", overrides=tuple({**dict(BLOCKS), "moe_intermediate_size": 192}.items()))
    _, reports = load(path, '{"linear": "block", "moe": "block", "overrides": {"experts": "channel"}}')
    assert_streamed(reports)


@pytest.mark.parametrize("scheme", ["channel", "int8", "tensor"])
def test_experts_without_a_gate_are_as_large_as_they_are(scheme, workers, checkpoint_folder, tmp_path):
    """The CPU reference cannot run them."""
    path = families.build("NemotronHForCausalLM", checkpoint_folder)
    job = LoadJob(path, environ={"SGLANG_STREAMFP8_SCHEME": json.dumps({"moe": scheme})})
    result, reports = load_reported(workers.load, job, tmp_path / "reports")
    assert_streamed(reports)
    weights = {name: t for name, t in result.ranks[0].tensors.items() if "layers.1.mixer.experts.w13" in name}
    (weight,) = (t for name, t in weights.items() if name.endswith("w13_weight"))
    assert weight.shape == (4, 96, 128)
    if scheme == "channel":
        tensors = load_file(path / "model.safetensors")
        rows = [tensors[f"backbone.layers.1.mixer.experts.{expert}.up_proj.weight"] for expert in range(4)]
        values, scales = quantize_rows(torch.cat(rows), torch.float8_e4m3fn)
        assert weight.sha256 == hash_of(values)
        (scale,) = (t for name, t in weights.items() if name.endswith("w13_weight_scale"))
        assert (scale.shape, scale.sha256) == ((4, 96, 1), hash_of(scales))


def test_experts_with_biases_cannot_be_int8_and_are_named(workers, checkpoint_folder):
    path = families.build("GptOssForCausalLM", checkpoint_folder)
    job = LoadJob(path, environ={"SGLANG_STREAMFP8_SCHEME": '{"moe": "int8"}'})
    with pytest.raises(LoadFailed, match=r"experts as 'int8': Experts with biases are not covered"):
        workers.load(replace(job, server_args=families.server_args("GptOssForCausalLM")))


def test_loader_that_knows_no_schemes_is_an_error(load, checkpoint):
    with pytest.raises(LoadFailed, match=r"SGLANG_STREAMFP8_SCHEME=block.*ShardedStateLoader"):
        load(checkpoint("qwen3"), "block", server_args={"load_format": "sharded_state"})
