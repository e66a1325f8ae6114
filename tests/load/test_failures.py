# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a checkpoint is said, with layer and tensor; nothing half-loaded is served."""

from __future__ import annotations

import io
import json
import re
import shutil
from dataclasses import replace

import numpy
import pytest
import torch
from harness.mutations import altered, pickled
from harness.streamed import load_reported, warnings_of
from safetensors.torch import load_file, save_file
from workbench.loads.checkpoints import CheckpointSpec, model_config
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, LoadFailed, compare
from workbench.loads.updates import Update

from sglang_overlay.settings import SCHEME_VARIABLE

LAYER = "model.layers.2.mlp.experts"
UP = f"{LAYER}.5.up_proj.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"
KV_B = "model.layers.1.self_attn.kv_b_proj.weight"
MULTI_TOKEN = (("num_nextn_predict_layers", 1),)


@pytest.fixture
def damaged(checkpoint, tmp_path):
    """A copy of a tiny checkpoint with its tensors changed."""
    return lambda change, family="qwen3_moe", **fields: altered(
        checkpoint(family, **fields), tmp_path / "damaged", change
    )


@pytest.fixture
def both(both):
    """A stock and a streaming load of one checkpoint, and the streaming load's report."""

    def load(path, **fields):
        stock, result, (report,) = both(path, streaming="1", **fields)
        return stock, result, report

    return load


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def with_values(**changes):
    """Change tensors in place: name and function of each."""
    return lambda tensors: [function(tensors[name]) for name, function in changes.items()]


class TestMissingTensors:
    def test_each_is_named_with_its_parameter_and_unit(self, workers, damaged):
        down = "model.layers.0.mlp.experts.3.down_proj.weight"
        key = "model.layers.1.self_attn.k_proj.weight"
        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(damaged(without(UP, down, key))))
        text = str(failure.value)
        assert "IncompleteLoadError: 3 parameters were never completely written" in text
        assert f"model.layers.0.mlp.experts.w2_weight (1 of 8 units: 3): missing {down}\n" in text
        assert f"model.layers.1.self_attn.qkv_proj.weight (1 of 1 units): missing {key}\n" in text
        assert f"{LAYER}.w13_weight (1 of 8 units: 5): missing {UP}\n" in text
        assert "SGLANG_STREAMFP8_ALLOW_MISSING=1" in text

    def test_where_every_layer_lacks_it_what_came_is_named(self, workers, damaged):
        """As in the layers of Gemma's assistants, which attend to their target's keys and values."""
        lost = [f"model.layers.{number}.self_attn.{part}_proj.weight" for number in range(3) for part in "kv"]
        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(damaged(without(*lost))))
        came = "model.layers.1.self_attn.q_proj.weight"
        assert f"qkv_proj.weight (1 of 1 units): only {came} came for it\n" in str(failure.value)

    def test_many_are_listed_in_part_with_how_many_more(self, workers, damaged):
        first = "model.layers.0.mlp.experts"
        layers = [f"model.layers.{number}" for number in range(3)]
        lost = [f"{layer}.mlp.experts.4.down_proj.weight" for layer in layers]
        lost += [f"{layer}.self_attn.{part}_proj.weight" for layer in layers[1:] for part in "koqv"]
        lost += [f"{first}.{expert}.{shard}_proj.weight" for expert in range(8) for shard in ("gate", "up")]
        lost += [f"{layer}.mlp.experts.{expert}.up_proj.weight" for expert, layer in enumerate(layers[1:])]
        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(damaged(without(*lost))))
        text = str(failure.value)
        assert "10 parameters were never completely written" in text
        assert "\n  and 2 more parameters\n" in text
        named = ", ".join(f"{first}.{expert}.{shard}_proj.weight" for expert in range(4) for shard in ("gate", "up"))
        assert f"{first}.w13_weight (8 of 8 units: 0, 1, 2, 3, 4, 5, 6, 7): missing {named} and 8 more" in text

    @pytest.mark.parametrize("layout", [{"tp_size": 2}, {"tp_size": 2, "ep_size": 2}])
    def test_it_is_named_on_several_ranks(self, layout, workers, damaged):
        with pytest.raises(LoadFailed, match=f"missing {UP}"):
            workers.load(LoadJob(damaged(without(UP)), **layout))

    def test_where_they_are_allowed_to_be_missing_they_are_zero(self, checkpoint, workers, damaged, tmp_path):
        lost = (UP, O_PROJ)
        zeroed = altered(
            checkpoint("qwen3_moe"), tmp_path / "zeroed", lambda tensors: [tensors[name].zero_() for name in lost]
        )
        stock = workers.load(LoadJob(zeroed, streaming="0", prompts=PROMPTS))
        environ = {"SGLANG_STREAMFP8_ALLOW_MISSING": "1"}
        job = LoadJob(damaged(without(*lost)), environ=environ, prompts=PROMPTS)
        result, (report,) = load_reported(workers.load, job, tmp_path / "reports")
        assert compare(stock, result) == []
        (warning,) = warnings_of(result)
        (told,) = report.warnings
        assert len(report.missing) == 2
        assert {name.rpartition(".")[0] for name in report.missing} < {layer.layer for layer in report.layers.figures}
        assert all(name in warning and name in told for name in lost)
        assert "zero" in warning

    @pytest.mark.parametrize("allowed", ["0", "1"])
    def test_weight_that_stock_quantizes_is_named_too_and_cannot_be_zero(self, allowed, workers, damaged):
        """MLA's ``kv_b_proj`` is not streamed; without it stock loads, and fails at the first request."""
        path = damaged(without(KV_B, "model.layers.2.self_attn.o_proj.weight"), "deepseek_v3")
        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(path, environ={"SGLANG_STREAMFP8_ALLOW_MISSING": allowed}))
        text = str(failure.value)
        assert "IncompleteLoadError: 2 parameters were never completely written" in text
        assert f"{KV_B} (1 of 1 units): missing {KV_B}\n" in text
        assert f"SGLang cannot serve at all without {KV_B}." in text


class TestMissingTensorsThatAreNotStreamed:
    """Stock serves ones, zeros or uninitialized memory without a word; that is what stays, with a warning."""

    @pytest.mark.parametrize(
        ("family", "names", "parameter"),
        [
            ("qwen3", ["model.layers.1.input_layernorm.weight"], "model.layers.1.input_layernorm.weight"),
            ("qwen3", ["model.layers.2.self_attn.q_norm.weight"], "model.layers.2.self_attn.q_norm.weight"),
            ("qwen3", ["model.norm.weight"], "model.norm.weight"),
            ("qwen3", ["lm_head.weight"], "lm_head.weight"),
            ("qwen3_moe", ["model.embed_tokens.weight"], "model.embed_tokens.weight"),
            ("qwen3_moe", ["model.layers.0.mlp.gate.weight"], "model.layers.0.mlp.gate.weight"),
            (
                "qwen2_moe",
                [f"model.layers.1.self_attn.{part}_proj.bias" for part in "qkv"],
                "model.layers.1.self_attn.qkv_proj.bias",
            ),
            (
                "deepseek_v3",
                ["model.layers.2.mlp.gate.e_score_correction_bias"],
                "model.layers.2.mlp.gate.e_score_correction_bias",
            ),
        ],
    )
    def test_parameter_is_named_and_stays_as_in_stock(self, family, names, parameter, both, damaged):
        stock, result, report = both(damaged(without(*names), family), uninitialized=0.5)
        assert compare(stock, result) == []
        (warning,) = warnings_of(result)
        assert f"nothing was loaded into 1 parameters that the checkpoint should hold: {parameter}." in warning
        assert report.layers.fallback == ()
        assert parameter in report.warnings[0]
        assert report.missing == (parameter,)

    def test_head_that_an_embedding_model_lacks_is_no_matter(self, both, damaged):
        options = {"server_args": {"is_embedding": True}, "uninitialized": 0.5}
        stock, result, _ = both(damaged(without("lm_head.weight"), "qwen3"), **options)
        assert compare(stock, result) == []
        assert warnings_of(result) == []

    def test_draft_that_lacks_more_than_its_target_gives_it_is_named(self, workers, damaged):
        path = damaged(without("model.layers.3.enorm.weight"), "deepseek_v3", overrides=MULTI_TOKEN)
        result = workers.load(LoadJob(path, draft=path))
        (warning,) = warnings_of(result)
        assert "hold: model.enorm.weight." in warning


def _without_weights_only():
    """A file of ``torch.save`` that it would take any code to read."""
    saved = io.BytesIO()
    torch.save({"array": numpy.ones(2)}, saved)
    return saved.getvalue()


class TestFiles:
    def test_cut_off_file_is_named(self, workers, checkpoint, damaged):
        path = damaged(lambda _: None)
        (weights,) = path.glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(LoadFailed, match=rf"SafetensorError(.|\n)*StreamFP8: {weights} is damaged"):
            workers.load(LoadJob(path))

    def test_empty_file_is_named(self, workers, damaged):
        path = damaged(lambda _: None)
        (weights,) = path.glob("*.safetensors")
        weights.write_bytes(b"")
        with pytest.raises(LoadFailed, match=rf"{weights.name} is empty or cut off: it has 0 bytes"):
            workers.load(LoadJob(path))

    def test_file_that_the_index_names_and_is_not_there_is_named(self, workers, checkpoint, tmp_path):
        path = tmp_path / "damaged"
        path.mkdir()
        for file in checkpoint("qwen3_moe", files=3).iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        (path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(LoadFailed, match=r"model-00002-of-00003\.safetensors"):
            workers.load(LoadJob(path))

    def test_file_of_a_model_that_is_named_as_on_the_hub_is_named(self, odd_workers, checkpoint, hub):
        name, folder = hub(checkpoint("qwen3", files=2), "cut-off")
        weights = folder / "model-00002-of-00002.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(LoadFailed, match=rf"SafetensorError(.|\n)*StreamFP8: {weights} is damaged"):
            odd_workers.load(LoadJob(name))

    def test_values_of_a_model_that_is_named_as_on_the_hub_are_counted(self, odd_workers, damaged, hub):
        name, _ = hub(damaged(lambda tensors: tensors[O_PROJ][0, :2].fill_(torch.nan), "qwen3"), "not-finite")
        (warning,) = warnings_of(odd_workers.load(LoadJob(name)))
        assert f"loaded from {O_PROJ} (2 of 65536 values)." in warning

    @pytest.mark.parametrize(
        ("suffix", "damage", "told"),
        [
            ("bin", lambda content: b"", "is empty"),
            ("bin", lambda content: content[:-100], "is cut off"),
            ("bin", lambda content: _without_weights_only(), "cannot be read: Weights only load failed"),
            ("pt", lambda content: b"<html>Not found</html>", "cannot be read: "),
        ],
        ids=["empty", "cut off", "arrays of numpy", "a web page"],
    )
    def test_pickled_file_that_cannot_be_read_is_named(self, suffix, damage, told, workers, checkpoint, tmp_path):
        path = pickled(checkpoint("qwen3"), tmp_path / "damaged", lambda entries: None, suffix)
        file = path / f"pytorch_model.{suffix}"
        file.write_bytes(damage(file.read_bytes()))
        torch.save({}, path / f"a.{suffix}")
        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(path, server_args={"load_format": "pt" if suffix == "pt" else "auto"}))
        assert f"StreamFP8: {file} {told}" in str(failure.value)
        assert str(failure.value).count("StreamFP8: ") == 1

    def test_file_that_nobody_reads_is_not_named(self, workers, damaged):
        path = damaged(without(UP))
        for name in ("training_args.bin", "pytorch_model.bin", "optimizer.pt"):
            (path / name).write_bytes(b"")
        places = {"weight_map": {"a": "consolidated-00001-of-00002.safetensors"}}
        (path / "consolidated.safetensors.index.json").write_text(json.dumps(places))
        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(path))
        assert f"missing {UP}\n" in str(failure.value)
        assert ".bin" not in str(failure.value)
        assert "consolidated" not in str(failure.value)

    def test_file_that_an_update_cannot_read_is_named(self, workers, checkpoint, tmp_path):
        path = shutil.copytree(checkpoint("qwen3", files=2, seed=1), tmp_path / "cut-off")
        weights = path / "model-00002-of-00002.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        result = workers.load(LoadJob(checkpoint("qwen3"), updates=(Update("disk", path),)))
        (failed,) = result.ranks[0].updates
        assert not failed.success
        assert f"{weights} is damaged, or its download is incomplete" in failed.message
        assert ".." not in failed.message
        assert compare(workers.load(LoadJob(checkpoint("qwen3"))), result) == []

    def test_file_of_an_update_that_is_named_as_on_the_hub_is_named(self, odd_workers, checkpoint, hub):
        name, folder = hub(checkpoint("qwen3", files=2, seed=1), "incomplete")
        (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
        result = odd_workers.load(LoadJob(checkpoint("qwen3"), updates=(Update("disk", name),)))
        (failed,) = result.ranks[0].updates
        assert not failed.success
        assert f"{folder}/model-00002-of-00002.safetensors is empty or cut off" in failed.message


def renamed(change):
    """Change the tensors' names."""

    def rename(tensors):
        given = {change(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(given)

    return rename


class TestNames:
    """Tensors that the model does not look for are named beside what is missing, with the change that would fit."""

    @pytest.mark.parametrize(
        ("family", "change", "told"),
        [
            ("qwen3", lambda name: f"_orig_mod.{name}", "leave out '_orig_mod.'"),
            ("qwen3_moe", lambda name: f"_orig_mod.{name}", "leave out '_orig_mod.'"),
            ("deepseek_v3", lambda name: f"_orig_mod.{name}", "leave out '_orig_mod.'"),
            ("qwen3_moe", lambda name: f"module.{name}", "strip 'module.' from their beginning"),
            ("deepseek_v3", lambda name: name.removeprefix("model."), "put 'model.' before them"),
            (
                "qwen3_moe",
                lambda name: name.replace("model.", "model.language_model."),
                "begin them with 'model.' in place of 'model.language_model.'",
            ),
            (
                "qwen3_moe",
                lambda name: name.replace(".mlp.", ".mlp._checkpoint_wrapped_module."),
                "leave out '_checkpoint_wrapped_module.'",
            ),
            (
                "deepseek_v3",
                lambda name: f"base_model.{name}".replace(".layers.", ".layers._fsdp_wrapped_module."),
                "leave out '_fsdp_wrapped_module.' and strip 'base_model.' from their beginning",
            ),
        ],
    )
    def test_prefix_that_does_not_fit_is_told(self, family, change, told, workers, damaged):
        """Some models pass over names that they do not know, others raise."""
        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(damaged(renamed(change), family)))
        assert told in str(failure.value)
        assert "download it anew" not in str(failure.value)

    def test_prefix_of_what_the_runai_streamer_reads_is_told(self, workers, damaged):
        pytest.importorskip("runai_model_streamer")
        path = damaged(renamed(lambda name: f"_orig_mod.{name}"), "qwen3_moe")
        with pytest.raises(LoadFailed, match=r"leave out '_orig_mod\.'"):
            workers.load(LoadJob(path, server_args={"load_format": "runai_streamer"}))

    def test_renamed_tensors_are_listed_beside_what_is_missing(self, workers, damaged):
        change = renamed(lambda name: name.replace("layers.1.self_attn.o_proj", "layers.1.self_attn.out_proj"))
        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(damaged(change)))
        text = str(failure.value)
        assert f"{O_PROJ} (1 of 1 units): missing {O_PROJ}\n" in text
        assert "read, but loaded into nothing: model.layers.1.self_attn.out_proj.weight\n" in text
        assert "give its tensors the names that the model looks for" in text

    def test_names_of_another_model_are_listed(self, workers, damaged):
        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(damaged(renamed(lambda name: re.sub(r"model.layers.(\d+).\w+", r"h.\1", name)))))
        assert re.search(r"read, but loaded into nothing: h\.0\.[^\n]* and \d+ more\n", str(failure.value))

    @pytest.mark.parametrize("suffix", ["qweight", "weight_packed"])
    def test_packed_tensors_are_told_to_be_quantized_already(self, suffix, workers, damaged):
        def pack(tensors):
            for name in [name for name in tensors if name.endswith("_proj.weight")]:
                stem = name.removesuffix("weight")
                tensors[f"{stem}{suffix}"] = tensors.pop(name).view(torch.int32)
                tensors[f"{stem}scales"] = torch.ones(2)

        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(damaged(pack, "qwen3")))
        assert "The checkpoint is quantized already" in str(failure.value)

    def test_tensors_in_a_dict_within_the_file_are_told(self, workers, checkpoint, tmp_path):
        path = pickled(checkpoint("qwen3"), tmp_path / "nested", lambda entries: {"epoch": 1, "state_dict": entries})
        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(path))
        told = r"loaded into nothing: epoch \(of type int\), state_dict \(a dict of \d+ entries\)\n"
        assert re.search(told, str(failure.value))
        assert "Save the tensors themselves" in str(failure.value)

    def test_tensors_that_no_layer_needs_are_not_listed(self, workers, damaged):
        def change(tensors):
            tensors.update({f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(3)})
            del tensors[O_PROJ]

        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(damaged(change)))
        assert "loaded into nothing" not in str(failure.value)
        assert "Complete the checkpoint (download it anew, check its index). SGLANG" in str(failure.value)


class TestTensorsThatDoNotFit:
    @pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
    def test_wrong_shape_is_an_error_that_names_tensor_and_parameter(self, family, workers, damaged):
        """DeepSeek's weight loaders run in threads of upstream's own."""

        def cut(tensors):
            tensors[UP] = tensors[UP][:, :-8]

        with pytest.raises(LoadFailed) as failure:
            workers.load(LoadJob(damaged(cut, family)))
        text = str(failure.value)
        assert text.count("StreamFP8: raised while loading") == 1
        assert f"loading {UP} (bfloat16 [128, 248]) into {LAYER}.w13_weight (bfloat16 [8, 256, 256])" in text

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
    def test_integers_are_refused(self, dtype, workers, damaged):
        def cast(tensors):
            tensors[UP] = tensors[UP].to(dtype)

        told = rf"UnsupportedDtypeError: {LAYER}\.w13_weight .* from {UP} of dtype {dtype}"
        with pytest.raises(LoadFailed, match=told):
            workers.load(LoadJob(damaged(cast)))

    @pytest.mark.parametrize(
        ("family", "dtype"),
        # Stock refuses float32 for DeepSeek ("Downcasting not allowed").
        [("qwen3_moe", torch.float16), ("qwen3_moe", torch.float32), ("deepseek_v3", torch.float16)],
    )
    def test_checkpoint_of_another_float_dtype_loads_as_stock(self, family, dtype, both, damaged):
        def cast(tensors):
            tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

        stock, result, report = both(damaged(cast, family), server_args={"dtype": "bfloat16"})
        assert compare(stock, result) == []
        assert report.layers.fallback == ()
        assert report.units.streamed > 0


class TestTensorsThatDoNotFillTheirPart:
    """Stock pads them with zeros, repeats them or cuts them off without a word."""

    GATE = "model.layers.1.mlp.gate_proj.weight"
    DOWN = "model.layers.1.mlp.down_proj.weight"
    EXPERT_DOWN = UP.replace("up", "down")

    @pytest.fixture
    def cut(self, damaged):
        """A checkpoint of which one tensor is replaced by a part of it, or by more."""
        return lambda family, name, change: damaged(
            lambda tensors: tensors.update({name: change(tensors[name])}), family
        )

    @pytest.mark.parametrize(
        ("family", "name", "change", "outcome", "tp_size"),
        [
            pytest.param("qwen3", GATE, lambda w: w[:-100], "padded with zeros", 1, id="gate too few rows"),
            pytest.param("qwen3", GATE, lambda w: w[:192], "padded with zeros", 2, id="gate half the rows over two"),
            pytest.param("qwen3", DOWN, lambda w: w[:, :-8], "padded with zeros", 2, id="down too few columns"),
            pytest.param("qwen3", O_PROJ, lambda w: w[:, :128], "padded with zeros", 1, id="o too few columns"),
            pytest.param("qwen3", O_PROJ, lambda w: w.repeat(1, 2), "cut off", 1, id="o too many columns"),
            pytest.param("qwen3_moe", UP, lambda w: w[:-8], "padded with zeros", 1, id="expert too few rows"),
            pytest.param("qwen3_moe", UP, lambda w: w[:64], "padded with zeros", 2, id="expert half the rows over two"),
            pytest.param("qwen3_moe", EXPERT_DOWN, lambda w: w[:, :64], "padded with zeros", 1, id="expert columns"),
            pytest.param("qwen3_moe", UP, lambda w: w[:1], "padded with zeros", 1, id="expert one row"),
            pytest.param("qwen3_moe", UP, lambda w: w[:1], "padded with zeros", 2, id="expert one row over two"),
            pytest.param("qwen3_moe", EXPERT_DOWN, lambda w: w[:1], "repeated", 1, id="expert down one row"),
            pytest.param("qwen3_moe", UP, lambda w: w[:, :1], "repeated", 1, id="expert one column"),
        ],
    )
    def test_load_is_stocks_with_a_warning_that_names_it(
        self, family, name, change, outcome, tp_size, workers, cut, tmp_path
    ):
        path = cut(family, name, change)
        job = LoadJob(path, tp_size=tp_size)
        stock, result = workers.load(replace(job, streaming="0")), workers.load(job)
        assert compare(stock, result) == []
        told = [line for line in warnings_of(result) if "do not have the shape that the model needs" in line]
        assert told
        assert all("1 tensors of the checkpoint do not" in line and f": {name} " in line for line in told)
        assert all(f", {outcome} to " in line for line in told)
        assert warnings_of(result) == told

    def test_wrong_size_in_the_config_is_told(self, workers, damaged):
        path = TestConfigThatIsNotTrue.said(damaged(lambda _: None), moe_intermediate_size=160)
        (told,) = warnings_of(workers.load(LoadJob(path)))
        assert "72 tensors of the checkpoint do not have the shape that the model needs: model.layers.0.mlp" in told

    @pytest.mark.parametrize("fields", [{"ep_size": 1}, {"ep_size": 2}])
    def test_size_that_sglang_rounds_up_is_meant(self, fields, workers, checkpoint):
        """Experts of 96 rows do not divide by two CPUs' 32 and become 128, as those of 3420 of a vision tower 3424."""
        path = checkpoint("qwen3_moe", overrides=(("moe_intermediate_size", 96),))
        job = LoadJob(path, streaming="require", tp_size=2, **fields)
        result = workers.load(job)
        assert compare(workers.load(replace(job, streaming="0")), result) == []
        assert warnings_of(result) == []

    @pytest.mark.parametrize("ep_size", [1, 2])
    @pytest.mark.parametrize("size", [160, 208])
    @pytest.mark.parametrize("scheme", ["channel", '{"moe": "int8"}', '{"linear": "channel", "moe": "block"}'])
    def test_experts_that_sglang_rounds_up_stream_by_rows(self, scheme, size, ep_size, workers, checkpoint):
        """To 192 or 256 rows on two CPUs: those of the checkpoint end within a unit."""
        path = checkpoint("qwen3_moe", overrides=(("moe_intermediate_size", size), ("num_hidden_layers", 1)))
        job = LoadJob(path, streaming="require", environ={SCHEME_VARIABLE: scheme}, tp_size=2, ep_size=ep_size)
        if "block" in scheme and size == 160:
            with pytest.raises(LoadFailed, match=r"SchemeError: .*experts as 'block': .* is not divisible by"):
                workers.load(job)
        else:
            assert warnings_of(workers.load(job)) == []

    @pytest.mark.parametrize(("family", "name"), [("qwen3", GATE), ("qwen3_moe", UP)])
    def test_it_is_an_error_where_streaming_is_required(self, family, name, workers, cut):
        with pytest.raises(LoadFailed, match=rf"MisfitError: 1 tensors .*: {name} "):
            workers.load(LoadJob(cut(family, name, lambda weight: weight[:-8]), streaming="require"))


class TestConfigThatIsNotTrue:
    """fp8 and high precision are cast to each other without a word, and the scales are lost."""

    @staticmethod
    def said(path, **config):
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return path

    @pytest.mark.parametrize(
        ("family", "name", "parameter", "streaming"),
        [
            pytest.param("qwen3_moe", O_PROJ, O_PROJ, "1", id="linear"),
            pytest.param("qwen3_moe", UP, f"{LAYER}.w13_weight", "require", id="expert"),
            pytest.param("qwen3_moe", "lm_head.weight", "lm_head.weight", "require", id="head"),
            pytest.param("deepseek_v3", KV_B, KV_B, "1", id="absorbed"),
        ],
    )
    def test_fp8_that_no_config_tells_of_is_an_error(self, family, name, parameter, streaming, workers, damaged):
        path = damaged(lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}), family)
        told = rf"UnsupportedDtypeError: {parameter}, torch.bfloat16, .* from {name} of dtype torch.float8_e4m3fn\. Its"
        with pytest.raises(LoadFailed, match=told):
            workers.load(LoadJob(path, streaming=streaming))

    @pytest.mark.parametrize("stored", ["fp8", "fp8_block"])
    def test_fp8_checkpoint_without_its_config_is_an_error(self, stored, workers, checkpoint, damaged):
        path = self.said(damaged(lambda _: None, stored=stored), quantization_config=None)
        with pytest.raises(LoadFailed, match=r"UnsupportedDtypeError: .* Its scales would be lost"):
            workers.load(LoadJob(path))

    def test_fp8_that_a_model_drops_is_told(self, both, workers, damaged):
        extra = {"model.unknown.weight": torch.ones(2, 2).to(torch.float8_e5m2)}
        path = damaged(lambda tensors: tensors.update(extra))
        stock, result, report = both(path)
        assert compare(stock, result) == []
        assert "1 tensors of fp8: model.unknown.weight." in report.warnings[0]
        with pytest.raises(LoadFailed, match=r"UnsupportedDtypeError: .* model\.unknown\.weight"):
            workers.load(LoadJob(path, streaming="require"))

    def test_model_that_is_served_in_bf16_is_cast_as_in_stock(self, both, damaged):
        path = damaged(lambda tensors: tensors.update({O_PROJ: tensors[O_PROJ].to(torch.float8_e4m3fn)}))
        stock, result, report = both(path, quantization=None)
        assert compare(stock, result) == []
        assert report.mode == "stock"

    @staticmethod
    def quantization_config(stored):
        return {"quantization_config": model_config(CheckpointSpec("qwen3_moe", stored=stored))["quantization_config"]}

    @pytest.mark.parametrize("stored", ["fp8", "fp8_block"])
    @pytest.mark.parametrize(("given", "streaming"), [("file", "1"), ("override", "require")])
    def test_high_precision_under_an_fp8_config_is_an_error(self, given, streaming, stored, workers, damaged):
        config = self.quantization_config(stored)
        path, options = damaged(lambda _: None), {}
        if given == "file":
            self.said(path, **config)
        else:
            options = {"json_model_override_args": json.dumps(config)}
        told = r"UnsupportedDtypeError: .*, torch.float8_e4m3fn, .* of dtype torch.bfloat16\. It would be cast to fp8"
        with pytest.raises(LoadFailed, match=told):
            workers.load(LoadJob(path, streaming=streaming, quantization=None, server_args=options))

    def test_high_precision_in_place_of_a_single_fp8_weight_is_an_error(self, workers, checkpoint, damaged):
        path = damaged(lambda tensors: tensors.update({O_PROJ: tensors[O_PROJ].bfloat16()}), stored="fp8_block")
        with pytest.raises(LoadFailed, match=rf"UnsupportedDtypeError: {O_PROJ}, torch.float8_e4m3fn, .*{O_PROJ}"):
            workers.load(LoadJob(path))

    def test_switched_off_it_is_stocks(self, workers, damaged):
        path = self.said(damaged(lambda _: None), **self.quantization_config("fp8_block"))
        told = workers.load(LoadJob(path, streaming="0", quantization=None)).log
        assert not [line for line in told if "StreamFP8" in line]


class TestTensorsThatComeTwice:
    @pytest.fixture
    def doubled(self, damaged):
        """A checkpoint of which another file, read before or after, has tensors of the same names with other values."""

        def make(*names, file):
            copies = {}
            path = damaged(lambda tensors: copies.update({name: tensors[name] * 2 for name in names}))
            save_file(copies, path / file, {"format": "pt"})
            return path

        return make

    @pytest.mark.parametrize(
        "names",
        [
            pytest.param((O_PROJ,), id="a whole unit"),
            pytest.param((UP, UP.replace("up", "gate")), id="a unit of two tensors"),
            pytest.param((UP,), id="part of a unit"),
            pytest.param((UP.replace("up", "gate"),), id="the part that is read first"),
        ],
    )
    @pytest.mark.parametrize("file", ["aa.safetensors", "zz.safetensors"])
    def test_last_one_wins_as_in_stock_with_a_warning_that_names_it(self, names, file, both, doubled):
        stock, result, report = both(doubled(*names, file=file))
        assert compare(stock, result) == []
        assert len(warnings_of(result)) == 1
        assert names[0] in warnings_of(result)[0]
        assert report.mode == "streaming"

    def test_same_values_twice_are_no_matter(self, both, damaged):
        copies = {}
        path = damaged(lambda tensors: copies.update({name: tensors[name] for name in (UP, O_PROJ)}))
        save_file(copies, path / "zz.safetensors", {"format": "pt"})
        stock, result, report = both(path)
        assert compare(stock, result) == []
        assert warnings_of(result) == []
        assert report.layers.fallback == ()


class TestValues:
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("name", [UP, O_PROJ])
    def test_nan_and_inf_load_as_stock_with_a_warning(self, name, value, both, damaged):
        stock, result, report = both(damaged(lambda tensors: tensors[name].view(-1)[7:9].fill_(value)))
        assert compare(stock, result) == []
        (warning,) = warnings_of(result)
        parameter = f"{LAYER}.w13_weight (1 of 8 units: 5)" if name == UP else f"{O_PROJ} (1 of 1 units)"
        size = 128 * 256 if name == UP else 256 * 256
        told = f"NaN or Inf in 1 parameters: {parameter}, loaded from {name} (2 of {size} values)."
        assert told in warning
        assert told in report.warnings[0]

    def test_tensors_of_a_checkpoint_that_is_not_read_again_are_not_counted(self, both, damaged):
        path = damaged(with_values(**{UP: lambda tensor: tensor.view(-1)[7].fill_(torch.nan)}))
        (file,) = path.glob("*.safetensors")
        torch.save(load_file(file), path / "pytorch_model.bin")
        file.unlink()
        stock, result, _ = both(path)
        assert compare(stock, result) == []
        (warning,) = warnings_of(result)
        assert f"w13_weight (1 of 8 units: 5), loaded from {UP.replace('up', 'gate')}, {UP}." in warning

    @pytest.mark.parametrize("name", [UP, O_PROJ])
    def test_nan_is_an_error_where_streaming_is_required(self, name, workers, damaged):
        path = damaged(lambda tensors: tensors[name].view(-1)[7].fill_(torch.nan))
        with pytest.raises(LoadFailed, match=rf"NonFiniteWeightError: NaN or Inf in 1 parameters: (.|\n)*{name}"):
            workers.load(LoadJob(path, streaming="require"))

    def test_nan_in_a_weight_that_stock_quantizes_is_told_as_in_one_that_is_streamed(self, both, damaged):
        path = damaged(with_values(**{KV_B: lambda tensor: tensor[0].fill_(torch.nan)}), "deepseek_v3")
        stock, result, _ = both(path)
        assert compare(stock, result) == []
        (warning,) = warnings_of(result)
        assert (
            f"NaN or Inf in 1 parameters: {KV_B} (1 of 1 units), loaded from {KV_B} (128 of 65536 values)." in warning
        )

    @pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.layers.0.mlp.gate.weight"])
    def test_nan_in_a_weight_that_stays_in_high_precision_is_a_warning(self, name, both, damaged):
        stock, result, _ = both(damaged(with_values(**{name: lambda tensor: tensor.view(-1)[7].fill_(torch.nan)})))
        assert compare(stock, result) == []
        (warning,) = warnings_of(result)
        assert f"NaN or Inf in 1 parameters that are served in high precision: {name}." in warning

    @pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
    def test_unit_of_zeros_gets_stocks_scale(self, family, both, damaged):
        zeros = [O_PROJ, "model.layers.1.self_attn.q_proj.weight"]
        zeros += [UP, UP.replace("up", "gate"), UP.replace("up", "down")] if family == "qwen3_moe" else []
        stock, result, _ = both(damaged(lambda tensors: [tensors[name].zero_() for name in zeros], family))
        assert compare(stock, result) == []
        assert warnings_of(result) == []
