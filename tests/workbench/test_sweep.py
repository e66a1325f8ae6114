import json
import shutil
from dataclasses import replace

import pytest
from workbench.quality import families, remote_families
from workbench.quality.sweep import OUTCOMES, Outcome, to_json, to_markdown, try_one

OUTCOME = Outcome("SomeForCausalLM", "identical", streamed=4)


@pytest.fixture
def outcome_of(workers, tmp_path):
    return lambda build: try_one("Qwen3ForCausalLM", build, workers, tmp_path / "reports")


def without(path, folder, name):
    """A copy of a single-file checkpoint that lacks one tensor."""
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(path, folder / "copy")
    tensors = load_file(copy / "model.safetensors")
    del tensors[name]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_family_that_streams_is_identical(outcome_of, checkpoint):
    found = outcome_of(lambda _: checkpoint("qwen3"))
    assert (found.outcome, found.streamed) == ("identical", 12)


def test_checkpoint_that_lacks_a_weight_is_refused(outcome_of, checkpoint, tmp_path):
    path = without(checkpoint("qwen3"), tmp_path, "model.layers.1.mlp.down_proj.weight")
    found = outcome_of(lambda _: path)
    assert found.outcome == "refused"
    assert "model.layers.1.mlp.down_proj.weight" in found.detail


def test_checkpoint_that_stock_cannot_load_is_stocks_fault(outcome_of, tmp_path):
    found = outcome_of(lambda _: tmp_path)
    assert found.outcome == "stock cannot load"


def test_model_that_cannot_be_built_has_no_checkpoint(outcome_of):
    def build(architecture):
        raise ValueError(f"{architecture} is too small")

    assert outcome_of(build) == Outcome(
        "Qwen3ForCausalLM", "no checkpoint", detail="ValueError: Qwen3ForCausalLM is too small"
    )


def test_what_is_told_holds_no_folder_and_no_time(outcome_of, tmp_path):
    def build(architecture):
        raise ValueError(f"no file {tmp_path}/checkpoints/config.json in a/b")

    assert outcome_of(build).detail == "ValueError: no file config.json in a/b"


def test_json_counts_outcomes():
    document = json.loads(to_json("0.5.23", [OUTCOME, replace(OUTCOME, outcome="refused")]))
    assert document["counts"] == {"identical": 1, "refused": 1}
    assert document["families"][0]["streamed"] == 4


def test_page_explains_every_outcome_and_lists_every_architecture():
    page = to_markdown("0.5.23", [OUTCOME])
    assert all(f"**{outcome}**" in page for outcome in OUTCOMES)
    assert "| SomeForCausalLM | identical | 4 | 0 | 0 |" in page


@pytest.mark.parametrize("known", [families, remote_families])
def test_family_is_built_once_with_a_different_scale_in_each_row(known, tmp_path):
    from safetensors.torch import load_file

    architecture = "MixtralForCausalLM" if known is families else "DeepseekForCausalLM"
    path = known.build(architecture, tmp_path)
    assert known.build(architecture, tmp_path) == path
    (weights,) = path.glob("*.safetensors")
    largest = next(v for k, v in load_file(weights).items() if k.endswith("o_proj.weight")).abs().amax(dim=1)
    assert largest.unique().numel() > largest.numel() / 2
    assert json.loads((path / "config.json").read_text())["architectures"] == [architecture]
