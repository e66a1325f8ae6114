import json
import shutil
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from workbench.loads.job import LoadJob
from workbench.loads.layouts import WeightLayout
from workbench.quality import families
from workbench.quality.architectures import PUBLISHED
from workbench.quality.making import made_of
from workbench.quality.published import Published, build, published_tensors
from workbench.quality.registered import registered
from workbench.quality.sweep import BAD, OUTCOMES, Outcome, from_json, to_json, to_markdown, tried
from workbench.quality.sweep_cli import parted

DOCS = Path(__file__).resolve().parents[2] / "docs"
OUTCOME = Outcome("identical", streamed=4)


@pytest.fixture
def outcome_of(workers, tmp_path):
    return lambda build: tried(build, workers, tmp_path / "reports")


def without(path, folder, name):
    """A copy of a single-file checkpoint that lacks one tensor."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(path, folder / "copy")
    tensors = load_file(copy / "model.safetensors")
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_family_that_streams_is_identical(outcome_of, checkpoint):
    found = outcome_of(lambda: LoadJob(checkpoint("qwen3")))
    assert (found.outcome, found.streamed) == ("identical", 12)


def test_checkpoint_that_lacks_a_weight_is_refused(outcome_of, checkpoint, tmp_path):
    path = without(checkpoint("qwen3"), tmp_path, "model.layers.1.mlp.down_proj.weight")
    found = outcome_of(lambda: LoadJob(path))
    assert found.outcome == "refused"
    assert "model.layers.1.mlp.down_proj.weight" in found.detail


def test_checkpoint_that_stock_cannot_load_is_stocks_fault(outcome_of, tmp_path):
    found = outcome_of(lambda: LoadJob(tmp_path))
    assert found.outcome == "stock cannot load"


def test_model_that_cannot_be_built_has_no_checkpoint(outcome_of):
    def build():
        raise ValueError("it is too small")

    assert outcome_of(build) == Outcome("cannot be built", detail="ValueError: it is too small")


def test_what_is_told_holds_no_folder_and_no_time(outcome_of, tmp_path):
    def build():
        raise ValueError(f"no file {tmp_path}/checkpoints/config.json in a/b")

    assert outcome_of(build).detail == "ValueError: no file config.json in a/b"


def test_outcomes_are_read_as_they_were_written():
    outcomes = {"SomeForCausalLM": OUTCOME, "OtherModel": replace(OUTCOME, outcome="refused", gpu="h200")}
    assert from_json(to_json("0.5.23", outcomes), "0.5.23") == outcomes


def test_outcomes_of_another_release_are_not_known():
    assert from_json(to_json("0.5.22", {"SomeForCausalLM": OUTCOME}), "0.5.23") == {}


def test_page_explains_every_outcome_and_lists_every_architecture():
    page = to_markdown("0.5.23", {"SomeForCausalLM": OUTCOME})
    assert all(f"**{outcome}**" in page for outcome in OUTCOMES)
    assert "| SomeForCausalLM | identical | CPU | 4 | 0 | 0 |" in page


def test_parts_are_all():
    names = tuple("abcdefg")
    assert sorted(sum((parted(names, f"{k}/3") for k in (1, 2, 3)), ())) == list(names)


def largest_of_each_row(path):
    from safetensors.torch import load_file

    (weights,) = path.glob("*.safetensors")
    return (
        next(v for k, v in load_file(weights).items() if k.endswith(("down_proj.weight", "w2.weight")))
        .abs()
        .amax(dim=1)
    )


@pytest.mark.parametrize("known", ["transformers", "published"])
def test_checkpoint_is_made_once_with_a_different_scale_in_each_row(known, workers, tmp_path):
    architecture = "Qwen3ForCausalLM" if known == "transformers" else "InternLM2ForCausalLM"
    make = partial(families.build, architecture, tmp_path)
    if known == "published":
        make = partial(build, architecture, PUBLISHED[architecture], tmp_path, workers)
    path = make()
    made = (path / "config.json").stat().st_mtime_ns
    assert make() == path
    assert (path / "config.json").stat().st_mtime_ns == made
    largest = largest_of_each_row(path)
    assert largest.unique().numel() > largest.numel() / 2
    assert json.loads((path / "config.json").read_text())["architectures"] == [architecture]


LAYOUTS = (
    WeightLayout("model.layers.0.self_attn.qkv_proj.weight", (256, 128), torch.bfloat16, (128, 64, 64)),
    WeightLayout("model.layers.0.mlp.experts.w13_weight", (2, 64, 128), torch.bfloat16),
    WeightLayout("model.layers.0.mlp.experts.w2_weight", (2, 128, 32), torch.bfloat16),
    WeightLayout("model.norm.weight", (128,), torch.bfloat16),
)


def shapes(**fields):
    return {name: shape for name, (shape, _) in published_tensors(LAYOUTS, Published("", {}, **fields)).items()}


def test_fused_layers_and_experts_are_taken_apart():
    assert shapes(names=((r"^model\.", ""), (r"^norm\.weight$", ""))) == {
        "layers.0.self_attn.q_proj.weight": (128, 128),
        "layers.0.self_attn.k_proj.weight": (64, 128),
        "layers.0.self_attn.v_proj.weight": (64, 128),
        **{f"layers.0.mlp.experts.{e}.{p}_proj.weight": (32, 128) for e in (0, 1) for p in ("gate", "up")},
        **{f"layers.0.mlp.experts.{e}.down_proj.weight": (128, 32) for e in (0, 1)},
    }


def test_layer_that_is_published_fused_stays_so():
    assert shapes(splits={"qkv_proj": ()})["model.layers.0.self_attn.qkv_proj.weight"] == (256, 128)


def test_parts_whose_rows_are_not_the_layers_are_an_error():
    with pytest.raises(ValueError, match="256 rows"):
        shapes(splits={"qkv_proj": (("q_proj", 128), ("kv_proj", 100))})


def test_checkpoint_that_leaves_a_parameter_unwritten_is_not_kept(workers, tmp_path):
    known = replace(PUBLISHED["InternLM2ForCausalLM"], names=((r".*layers\.1\.feed_forward\.w2.*", ""),))
    with pytest.raises(ValueError, match=r"layers\.1\.feed_forward\.w2\.weight"):
        build("InternLM2ForCausalLM", known, tmp_path, workers)
    assert not (tmp_path / "InternLM2ForCausalLM").exists()


def test_other_data_is_seen():
    known = PUBLISHED["InternLM2ForCausalLM"]
    before = made_of("InternLM2ForCausalLM")
    assert made_of("InternLM2ForCausalLM") == before
    PUBLISHED["InternLM2ForCausalLM"] = replace(known, names=(("a", "b"),))
    try:
        assert made_of("InternLM2ForCausalLM") != before
    finally:
        PUBLISHED["InternLM2ForCausalLM"] = known


def test_every_registered_architecture_has_an_outcome_of_todays_data():
    """Or else: ``ci/sweep --resume``."""
    release, known = version("sglang"), from_json((DOCS / "families.json").read_text(), version("sglang"))
    if not known:
        pytest.skip("the page is another release's")
    assert sorted(known) == list(registered())
    assert [one for one, outcome in known.items() if outcome.made_of != made_of(one)] == []
    assert [one for one, outcome in known.items() if outcome.outcome in BAD] == []
    assert (DOCS / "families.md").read_text() == to_markdown(release, known)
