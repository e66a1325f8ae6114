# SPDX-License-Identifier: Apache-2.0
"""Weight updates end where a fresh load of the new weights ends, in the memory that was being served all along.

The workers' updates go through SGLang's own ``WeightUpdater``, those of the server and the engine through everything.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from shutil import copytree

import pytest
import torch
from harness.mutations import altered
from harness.streamed import warnings_of
from safetensors.torch import load_file, save_file
from workbench.loads.job import LoadJob
from workbench.loads.loads import PROMPTS, compare
from workbench.loads.updates import Update
from workbench.quality import families

from sglang_overlay.hooks import releases
from sglang_overlay.hooks.update_hooks import BEFORE_CALL, BEFORE_UPDATE
from sglang_overlay.settings import SCHEME_VARIABLE

FAMILIES = ("qwen3", "qwen3_moe", "deepseek_v3")
SEED = 1

SOURCES = {
    "disk": {"source": "disk"},
    "tensors": {"source": "tensor"},
    "tensors in many calls": {"source": "tensor", "calls": 7, "order": "shuffled"},
    "flattened buckets": {"source": "bucket", "calls": 3},
}
BEGIN = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.begin_weight_update"
SESSIONS = pytest.mark.needs(BEGIN)
"""What only the end of a session can tell. In releases without sessions, weights wait for the calls that complete them.
"""


@pytest.fixture(scope="session")
def fresh(workers, checkpoint):
    """A fresh streamed load of the new weights of a family, with greedy outputs; loaded once."""

    @cache
    def load(family, tp_size):
        path = checkpoint(family, seed=SEED)
        return workers.load(LoadJob(path, streaming="require", tp_size=tp_size, prompts=PROMPTS))

    return load


@pytest.fixture
def update(workers, checkpoint):
    """A streamed load of a family's old weights, updated."""

    def run(family, *updates, tp_size=1, **fields):
        made = tuple(Update(checkpoint=checkpoint(family, seed=seed), **how) for seed, how in updates)
        job = LoadJob(checkpoint(family), streaming="require", tp_size=tp_size, updates=made, prompts=PROMPTS, **fields)
        return workers.load(job)

    return run


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", FAMILIES)
def test_update_ends_as_a_fresh_load_in_the_same_memory(family, source, update, fresh):
    result = update(family, (SEED, SOURCES[source]))
    (done,) = result.ranks[0].updates
    assert done.success, done.message
    assert done.moved == ()
    assert compare(fresh(family, 1), result) == []


@pytest.mark.parametrize(
    ("family", "source"),
    [("deepseek_v3", "disk"), ("deepseek_v3", "tensors in many calls"), ("qwen3_moe", "tensors in many calls")],
)
def test_update_of_two_ranks_ends_as_a_fresh_load(family, source, update, fresh):
    result = update(family, (SEED, SOURCES[source]), tp_size=2)
    assert all(rank.updates[0].success and rank.updates[0].moved == () for rank in result.ranks)
    assert compare(fresh(family, 2), result) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_many_updates_in_a_row_end_where_the_last_one_does(family, update, fresh):
    steps = [(2, SOURCES["disk"]), (0, SOURCES["flattened buckets"]), (SEED, SOURCES["tensors in many calls"])]
    result = update(family, *steps)
    assert [done.success for done in result.ranks[0].updates] == [True, True, True]
    assert [done.moved for done in result.ranks[0].updates] == [(), (), ()]
    assert compare(fresh(family, 1), result) == []


PARTS = {
    "qwen3": r"layers\.1\.self_attn|layers\.0\.mlp\.down_proj|norm",
    "qwen3_moe": r"layers\.1\.mlp\.experts\.[35]\.|layers\.0\.mlp\.experts\.\d\.down_proj|embed",
    "deepseek_v3": r"layers\.1\.self_attn\.kv_b_proj|layers\.2\.mlp\.experts\.4\.|layers\.0\.self_attn\.q_a|"
    r"layers\.0\.self_attn\.kv_a_proj",
}


@pytest.mark.parametrize("source", ["disk", "tensors in many calls", "flattened buckets"])
@pytest.mark.parametrize("family", FAMILIES)
def test_partial_update_replaces_its_units_and_leaves_all_others(family, source, update, workers, checkpoint, tmp_path):
    result = update(family, (SEED, {**SOURCES[source], "names": PARTS[family]}))
    assert result.ranks[0].updates[0].success
    assert result.ranks[0].updates[0].moved == ()
    mixed = mixture(checkpoint(family), checkpoint(family, seed=SEED), PARTS[family], tmp_path / "mixed")
    assert compare(workers.load(LoadJob(mixed, streaming="require", prompts=PROMPTS)), result) == []


def mixture(old, new, names, folder):
    """A checkpoint with the tensors of ``new`` where ``names`` is found in their names, of ``old`` elsewhere."""
    copytree(old, folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        replaced = {name: tensor for name, tensor in load_file(new / file.name).items() if re.search(names, name)}
        assert replaced
        save_file({**tensors, **replaced}, file, metadata={"format": "pt"})
    return folder


HALVES = {
    "qwen3": (r"layers\.1\.self_attn\.q_proj", "model.layers.1.self_attn.qkv_proj.weight (1 of 1 units)"),
    "qwen3_moe": (r"layers\.2\.mlp\.experts\.[25]\.up_proj", "model.layers.2.mlp.experts.w13_weight (2 of 8 units)"),
    "deepseek_v3": (r"layers\.2\.self_attn\.q_a_proj", "model.layers.2.self_attn.fused_qkv_a_proj_with_mqa.weight"),
}


@pytest.mark.parametrize("source", ["disk", "tensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_half_a_unit_is_an_error_that_names_it_and_keeps_the_old_values(family, source, update, workers, checkpoint):
    names, named = HALVES[family]
    result = update(family, (SEED, {**SOURCES[source], "names": names}))
    (done,) = result.ranks[0].updates
    may_come = source == "tensors" and BEGIN in releases.absent()
    assert done.success is may_come
    assert named in done.message
    assert ("keep their values until later calls bring what shares their scales" if may_come else BEFORE_UPDATE) in (
        done.message
    )
    assert done.moved == ()
    assert compare(workers.load(LoadJob(checkpoint(family), streaming="require", prompts=PROMPTS)), result) == []


DIRECT_LOADER = f"{'.'.join(BEGIN.split('.')[:-2])}._model_load_weights_direct"


@pytest.mark.parametrize("loader", ["", pytest.param(DIRECT_LOADER, marks=SESSIONS)], ids=["itself", "as a loader"])
def test_direct_update_takes_the_parameters_own_names(loader, update, workers, checkpoint, tmp_path):
    names = r"o_proj|down_proj|layernorm"
    how = {"source": "direct", "names": names, "loader": loader}
    result = update("qwen3", (SEED, how), server_args={"custom_weight_loader": [DIRECT_LOADER]})
    assert result.ranks[0].updates[0].success, result.ranks[0].updates[0].message
    mixed = mixture(checkpoint("qwen3"), checkpoint("qwen3", seed=SEED), names, tmp_path / "mixed")
    assert compare(workers.load(LoadJob(mixed, streaming="require", prompts=PROMPTS)), result) == []


def test_loader_that_reads_what_is_served_is_an_error_and_nothing_changes(update, workers, checkpoint):
    """verl's delta engine sends differences, and leaves all other values alone; of what is quantized these are gone."""
    names, loader = "o_proj|norm", "harness.delta_loader.load_differences"
    how = {"source": "tensor", "names": names, "loader": loader}
    result = update("qwen3", (SEED, how), server_args={"custom_weight_loader": [loader]})
    (done,) = result.ranks[0].updates
    assert not done.success
    assert "model.layers.0.self_attn.o_proj.weight cannot take this tensor" in done.message
    assert BEFORE_UPDATE in done.message
    assert compare(workers.load(LoadJob(checkpoint("qwen3"), streaming="require", prompts=PROMPTS)), result) == []


@pytest.mark.parametrize("architecture", ["RepackingForCausalLM", "LoaderlessForCausalLM"])
def test_direct_update_of_what_stock_quantized_is_an_error_not_a_cast(architecture, odd_workers, checkpoint):
    old, new = (checkpoint("qwen3", overrides=(("architectures", (architecture,)),), seed=seed) for seed in (0, SEED))
    update = Update("direct", new, names=r"layers\.0\.self_attn\.o_proj")
    result = odd_workers.load(LoadJob(old, streaming="1", updates=(update,)))
    (done,) = result.ranks[0].updates
    assert not done.success
    assert "model.layers.0.self_attn.o_proj.weight was quantized by stock SGLang" in done.message
    assert compare(odd_workers.load(LoadJob(old, streaming="1")), result) == []


def test_update_leaves_what_a_model_notes_down_on_the_weights_that_are_served(odd_workers, checkpoint):
    old, new = (
        checkpoint("qwen3_moe", overrides=(("architectures", ("NotingExpertsForCausalLM",)),), seed=seed)
        for seed in (0, SEED)
    )
    result = odd_workers.load(LoadJob(old, streaming="1", updates=(Update("disk", new),)))
    (done,) = result.ranks[0].updates
    assert done.success, done.message
    assert done.moved == ()
    assert compare(odd_workers.load(LoadJob(new, streaming="1")), result) == []


@pytest.fixture
def misshapen(checkpoint, tmp_path):
    """New weights of a family, of which one has half its rows."""

    def make(family, name, seed=SEED):
        copytree(checkpoint(family, seed=seed), tmp_path / "misshapen")
        (file,) = (tmp_path / "misshapen").glob("*.safetensors")
        tensors = load_file(file)
        tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()
        save_file(tensors, file, metadata={"format": "pt"})
        return tmp_path / "misshapen"

    return make


BAD = {
    "qwen3_moe": "model.layers.1.mlp.experts.3.down_proj.weight",
    "deepseek_v3": "model.layers.1.self_attn.kv_b_proj.weight",
}
BAD_PARAMETER = {
    "qwen3_moe": "model.layers.1.mlp.experts.w2_weight",
    "deepseek_v3": "model.layers.1.self_attn.kv_b_proj.weight",
}


@SESSIONS
@pytest.mark.parametrize("family", BAD)
def test_failed_tensor_is_an_error_that_names_it_and_the_next_update_succeeds(
    family, workers, checkpoint, misshapen, fresh
):
    broken = Update("tensor", misshapen(family, BAD[family]), calls=3)
    good = Update("tensor", checkpoint(family, seed=SEED), calls=3)
    job = LoadJob(checkpoint(family), streaming="require", updates=(broken, good), prompts=PROMPTS)
    result = workers.load(job)
    failed, succeeded = result.ranks[0].updates
    assert not failed.success
    assert f"{BAD_PARAMETER[family]} cannot take this tensor" in failed.message
    assert BEFORE_CALL in failed.message
    assert "a call of this update failed, and what it was to bring has not come since" in failed.message
    assert BEFORE_UPDATE in failed.message
    assert failed.moved == ()
    assert succeeded.success
    assert compare(fresh(family, 1), result) == []


@pytest.mark.parametrize("family", BAD)
def test_failed_update_from_disk_goes_back_to_the_weights_before(family, workers, checkpoint, misshapen):
    broken = Update("disk", misshapen(family, BAD[family]))
    result = workers.load(LoadJob(checkpoint(family), streaming="require", updates=(broken,), prompts=PROMPTS))
    (failed,) = result.ranks[0].updates
    assert not failed.success
    assert f"{BAD_PARAMETER[family]} cannot take this tensor" in failed.message
    assert BEFORE_UPDATE in failed.message
    assert ".." not in failed.message
    assert failed.moved == ()
    assert compare(workers.load(LoadJob(checkpoint(family), streaming="require", prompts=PROMPTS)), result) == []


def test_mistyped_path_is_forgotten_by_the_next_update_from_disk(workers, checkpoint, misshapen):
    mistyped = Update("disk", checkpoint("qwen3_moe").parent / "mistyped")
    broken = Update("disk", misshapen("qwen3_moe", BAD["qwen3_moe"]))
    job = LoadJob(checkpoint("qwen3_moe"), streaming="require", updates=(mistyped, broken), prompts=PROMPTS)
    result = workers.load(job)
    first, second = result.ranks[0].updates
    assert not first.success
    assert "Failed to get weights iterator" in first.message
    assert not second.success
    assert [BEFORE_UPDATE in answer.message for answer in (first, second)] == [True, True]
    assert compare(workers.load(LoadJob(checkpoint("qwen3_moe"), streaming="require", prompts=PROMPTS)), result) == []


@pytest.mark.parametrize("source", ["disk", "tensors"])
@pytest.mark.parametrize("family", BAD)
def test_nan_is_served_as_sent_with_a_warning_that_names_the_parameter(family, source, workers, checkpoint, tmp_path):
    def spoil(tensors):
        tensors[BAD[family]][0, 0] = torch.nan

    spoiled = altered(checkpoint(family, seed=SEED), tmp_path / "spoiled", spoil)
    update = Update(checkpoint=spoiled, **SOURCES[source])
    result = workers.load(LoadJob(checkpoint(family), streaming="1", updates=(update,)))
    assert result.ranks[0].updates[0].success
    assert compare(workers.load(LoadJob(spoiled, streaming="1")), result) == []
    (warning,) = warnings_of(result)
    assert f"NaN or Inf into 1 parameters: {BAD_PARAMETER[family]}." in warning


@pytest.mark.parametrize("how", [{"source": "disk"}, {"source": "tensor", "calls": 7}], ids=["disk", "tensors"])
def test_update_needs_memory_for_what_it_replaces_and_for_units(how, workers, checkpoint):
    shape = (("num_experts", 64), ("moe_intermediate_size", 384), ("hidden_size", 512), ("num_hidden_layers", 6))
    paths = [checkpoint("qwen3_moe", overrides=shape, seed=seed) for seed in (0, SEED)]
    update = Update(checkpoint=paths[1], **how)
    (rank,) = workers.load_fresh(LoadJob(paths[0], streaming="require", updates=(update,) * 2)).ranks
    unit = 2 * 384 * 512 * 2
    assert rank.model_bytes > 200 * unit
    for done in rank.updates:
        assert done.success, done.message
        # Beside what is undone from: tensors that wait for their unit, and what malloc keeps of them.
        assert done.memory.peak_above_start < rank.model_bytes + 30 * unit


@pytest.mark.parametrize("family", BAD)
def test_failed_update_from_disk_leaves_the_weights_that_an_update_had_brought(
    family, workers, checkpoint, misshapen, fresh
):
    good = Update("tensor", checkpoint(family, seed=SEED))
    broken = Update("disk", misshapen(family, BAD[family], seed=2))
    job = LoadJob(checkpoint(family), streaming="require", updates=(good, broken), prompts=PROMPTS)
    result = workers.load(job)
    assert [done.success for done in result.ranks[0].updates] == [True, False]
    assert compare(fresh(family, 1), result) == []


def renamed(checkpoint, folder, change):
    """A copy of a checkpoint whose tensors have the names that ``change`` makes of theirs; None leaves one out."""

    def rename(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            if (new := change(name)) is not None:
                tensors[new] = tensor

    return altered(checkpoint, folder, rename)


def test_what_a_whole_checkpoint_lacks_is_named_and_one_that_has_nothing_is_an_error(
    workers, checkpoint, tmp_path, fresh
):
    new = checkpoint("qwen3_moe", seed=SEED)
    prefixed = renamed(new, tmp_path / "prefixed", lambda name: f"_orig_mod.{name}")
    lacking = renamed(new, tmp_path / "lacking", lambda name: None if "experts.2.down_proj" in name else name)
    without_norm = renamed(new, tmp_path / "norm", lambda name: None if name == "model.norm.weight" else name)
    module = renamed(new, tmp_path / "module", lambda name: f"module.{name}" if "1.self_attn.o_proj" in name else name)
    updates = tuple(
        Update("disk", folder) for folder in (prefixed, module, lacking, without_norm, checkpoint("qwen3"), new)
    )
    result = workers.load(LoadJob(checkpoint("qwen3_moe"), streaming="require", updates=updates, prompts=PROMPTS))
    nothing, renamed_part, part, norm, _, whole = result.ranks[0].updates
    assert not nothing.success
    assert "nothing of this checkpoint belongs to the model that is served" in nothing.message
    assert "_orig_mod.model.layers.0" in nothing.message
    assert "Rename the checkpoint's tensors: leave out '_orig_mod.'. All weights are" in nothing.message
    assert renamed_part.success
    assert "model.layers.1.self_attn.o_proj.weight (1 of 1 units)" in renamed_part.message
    assert (
        "Rename the checkpoint's tensors: strip 'module.' from their beginning. Nothing took 1" in renamed_part.message
    )
    assert part.success
    assert "model.layers.0.mlp.experts.w2_weight (1 of 8 units)" in part.message
    assert norm.success
    assert "keeps its values: model.norm.weight (1 in all)" in norm.message
    assert (whole.success, whole.message) == (True, "Succeeded to update model weights.")
    assert compare(fresh("qwen3_moe", 1), result) == []


def test_dense_checkpoint_for_a_model_of_experts_names_what_it_leaves(workers, checkpoint):
    update = Update("disk", checkpoint("qwen3", seed=SEED))
    (done,) = workers.load(LoadJob(checkpoint("qwen3_moe"), streaming="require", updates=(update,))).ranks[0].updates
    assert "experts" in done.message
    if done.success:
        assert "keeps its values" in done.message


def test_names_that_nothing_takes_are_told(workers, checkpoint, tmp_path):
    new = checkpoint("qwen3_moe", seed=SEED)
    strange = renamed(new, tmp_path / "strange", lambda name: f"_orig_mod.{name}" if "lm_head" in name else name)
    updates = tuple(Update(source, strange) for source in ("tensor", "bucket"))
    for done in workers.load(LoadJob(checkpoint("qwen3_moe"), updates=updates)).ranks[0].updates:
        assert done.success
        assert "Nothing took 1 of the tensors: _orig_mod.lm_head.weight." in done.message


def test_layer_that_a_model_has_deleted_after_reading_it_is_updated(workers, checkpoint_folder, tmp_path):
    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].roll(1, 0)

    old = families.build("MiniCPM3ForCausalLM", checkpoint_folder)
    new = altered(old, tmp_path / "new", change)
    updates = Update("tensor", new, names="o_proj"), Update("disk", new), Update("tensor", new)
    result = workers.load(LoadJob(old, streaming="1", updates=updates))
    for done in result.ranks[0].updates:
        assert done.success, done.message
    assert compare(workers.load(LoadJob(new, streaming="1")), result) == []


def test_tensors_that_a_model_leaves_without_memory_are_no_matter(odd_workers, checkpoint):
    described = (("architectures", ("LeavingTensorsWithoutMemoryForCausalLM",)),)
    old, new = (checkpoint("qwen3", overrides=described, seed=seed) for seed in (0, SEED))
    result = odd_workers.load(LoadJob(old, streaming="1", updates=(Update("tensor", new), Update("disk", new))))
    for done in result.ranks[0].updates:
        assert done.success, done.message
    assert compare(odd_workers.load(LoadJob(new, streaming="1")), result) == []


@pytest.mark.parametrize("source", ["tensor", "bucket", "direct", "disk"])
@pytest.mark.parametrize(("family", "stored"), [("qwen3", "fp8"), ("qwen3_moe", "fp8_block")])
def test_fp8_checkpoint_is_never_updated_by_a_cast(family, stored, source, workers, checkpoint):
    """Stock answers success, and serves values without their scales: of square layers, or of blocks."""
    served = checkpoint(family, stored=stored)
    update = Update(source, checkpoint(family, seed=SEED), names=r"layers\.1\.self_attn\.o_proj")
    (done,) = workers.load(LoadJob(served, streaming="1", updates=(update,))).ranks[0].updates
    assert not done.success
    assert "is served as fp8 that SGLang itself has loaded" in done.message


def test_fp8_checkpoint_is_updated_by_another_as_in_stock(workers, checkpoint):
    served, new = (checkpoint("qwen3_moe", stored="fp8_block", seed=seed) for seed in (0, SEED))
    job = LoadJob(served, updates=(Update("disk", new),))
    stock, result = (workers.load(replace(job, streaming=mode)) for mode in ("0", "1"))
    stock_done, done = (loaded.ranks[0].updates[0] for loaded in (stock, result))
    assert done.success == stock_done.success, done.message
    assert compare(stock, result) == []


GATE, DOWN, O_PROJ = (
    f"model.layers.1.{part}.weight" for part in ("mlp.gate_proj", "mlp.down_proj", "self_attn.o_proj")
)
EXPERT = "model.layers.1.mlp.experts.3.{}_proj.weight"
MISFITS = {
    "qwen3": [
        (GATE, lambda weight: weight[:-100], "padded with zeros"),
        (DOWN, lambda weight: weight[:, :-8], "padded with zeros"),
        (O_PROJ, lambda weight: weight[:, :128], "padded with zeros"),
        (O_PROJ, lambda weight: weight.repeat(1, 2), "cut off"),
    ],
    "qwen3_moe": [
        (EXPERT.format("up"), lambda weight: weight[:-8], "padded with zeros"),
        (EXPERT.format("down"), lambda weight: weight[:, :64], "padded with zeros"),
        (EXPERT.format("up"), lambda weight: weight[:1], "padded with zeros"),
        (EXPERT.format("down"), lambda weight: weight[:1], "repeated"),
        (EXPERT.format("up"), lambda weight: weight[:, :1], "repeated"),
    ],
}


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", MISFITS)
def test_tensors_that_do_not_fill_their_part_are_an_error_that_names_them(
    family, tp_size, workers, checkpoint, tmp_path
):
    updates, named = [], []
    for number, (name, change, outcome) in enumerate(MISFITS[family]):
        folder = altered(
            checkpoint(family, seed=SEED),
            tmp_path / str(number),
            lambda tensors, name=name, change=change: tensors.update({name: change(tensors[name])}),
        )
        together = re.sub("gate|up", "(gate|up)", name)
        for update in (Update("disk", folder), Update("tensor", folder, names=together), Update("bucket", folder)):
            updates.append(update)
            named.append((f"1 tensors do not have the shape that the model needs: {name} ", f", {outcome} to "))
    job = LoadJob(checkpoint(family), streaming="require", tp_size=tp_size, updates=tuple(updates))
    result = workers.load(job)
    for done, texts in zip(result.ranks[0].updates, named, strict=True):
        assert not done.success, texts
        assert all(text in done.message for text in (*texts, BEFORE_UPDATE)), done.message
    assert compare(workers.load(LoadJob(checkpoint(family), streaming="require", tp_size=tp_size)), result) == []


@pytest.mark.parametrize("ep_size", [1, 2])
def test_size_that_sglang_rounds_up_is_updated(ep_size, workers, checkpoint):
    """Experts of 96 rows do not divide by two CPUs' 32 and become 128."""
    old, new = (checkpoint("qwen3_moe", overrides=(("moe_intermediate_size", 96),), seed=seed) for seed in (0, SEED))
    updates = Update("tensor", new, names=r"layers\.0\.mlp\.experts\.3\."), Update("disk", new)
    fields = {"streaming": "require", "tp_size": 2, "ep_size": ep_size}
    result = workers.load(LoadJob(old, updates=updates, **fields))
    for done in result.ranks[0].updates:
        assert done.success, done.message
    assert compare(workers.load(LoadJob(new, **fields)), result) == []


ENDS = r"re:.*\.layers\.(0|2)\..*"
LEFT_IN_BF16 = {
    "SGLANG_FP8_IGNORED_LAYERS": "model.layers.0,model.layers.2",
    SCHEME_VARIABLE: json.dumps({"linear": "channel", "moe": "channel", "ignore": [ENDS]}),
}


@SESSIONS
@pytest.mark.parametrize("variable", LEFT_IN_BF16)
@pytest.mark.parametrize(
    ("family", "weights", "beside"),
    # SGLang ties the head of Qwen3, but not that of Qwen2-MoE, which has biases.
    [
        ("qwen2_moe", "mlp.experts.w", "model.layers.1.self_attn.qkv_proj.bias"),
        ("qwen3", "mlp.gate_up_proj.weight", "model.embed_tokens.weight"),
    ],
)
def test_first_and_last_layers_in_bf16_biases_and_tied_heads_are_updated_like_the_rest(
    family, weights, beside, variable, workers, checkpoint
):
    seeds = [*zip((2, 0, SEED), ("disk", "flattened buckets", "tensors in many calls"), strict=True)]
    paths = {seed: checkpoint(family, tied_embeddings=family == "qwen3", seed=seed) for seed in (0, SEED, 2)}
    job = LoadJob(paths[SEED], streaming="require", environ={variable: LEFT_IN_BF16[variable]}, prompts=PROMPTS)
    fresh = workers.load(job)
    made = tuple(Update(checkpoint=paths[seed], **SOURCES[source]) for seed, source in seeds)
    updated = workers.load(replace(job, checkpoint=paths[0], updates=made))
    assert [(done.success, done.moved) for done in updated.ranks[0].updates] == [(True, ())] * 3
    assert compare(fresh, updated) == []
    dtypes = {name: tensor.dtype for name, tensor in updated.ranks[0].tensors.items()}
    of_layers = {layer: {dtypes[name] for name in dtypes if f"layers.{layer}.{weights}" in name} for layer in "012"}
    assert str(torch.bfloat16) not in of_layers["1"]
    assert of_layers["0"] == of_layers["2"] == {str(torch.bfloat16)}
    assert beside in dtypes
