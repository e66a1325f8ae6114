"""Checkpoints: names, files, index, values, read back with the safetensors library and transformers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from workbench.loads.checkpoints import (
    FAMILIES,
    SIZES,
    CheckpointSpec,
    Family,
    build,
    checkpoint_path,
    file_plan,
    tensor_plans,
)

if TYPE_CHECKING:
    from pathlib import Path

SHARED_NAMES = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
LAYER_1_NAMES: dict[Family, set[str]] = {
    "qwen3": {"self_attn.q_proj.weight", "self_attn.q_norm.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight"},
    "qwen2_moe": {
        "self_attn.k_proj.bias",
        "mlp.gate.weight",
        "mlp.experts.7.up_proj.weight",
        "mlp.shared_expert.gate_proj.weight",
        "mlp.shared_expert_gate.weight",
    },
    "qwen3_moe": {"self_attn.k_norm.weight", "mlp.gate.weight", "mlp.experts.0.gate_proj.weight"},
    "deepseek_v2": {
        "self_attn.q_proj.weight",
        "self_attn.kv_a_proj_with_mqa.weight",
        "self_attn.kv_a_layernorm.weight",
        "self_attn.kv_b_proj.weight",
        "mlp.shared_experts.down_proj.weight",
    },
    "deepseek_v3": {
        "self_attn.q_a_proj.weight",
        "self_attn.q_a_layernorm.weight",
        "self_attn.q_b_proj.weight",
        "mlp.gate.e_score_correction_bias",
        "mlp.experts.7.down_proj.weight",
    },
}


def read(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors checkpoint folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 - safe_open is no mapping
    return tensors


def index_of(path: Path) -> dict[str, str]:
    weight_map: dict[str, str] = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    return weight_map


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_dtypes_are_as_planned(family: Family, tmp_path: Path) -> None:
    spec = CheckpointSpec(family)
    tensors = read(build(spec, tmp_path))
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        plan.name: (plan.shape, plan.dtype) for plan in tensor_plans(spec)
    }
    assert tensors.keys() >= SHARED_NAMES | {f"model.layers.1.{name}" for name in LAYER_1_NAMES[family]}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_accepts_every_name_and_shape(family: Family, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    path = build(CheckpointSpec(family, files=3), tmp_path)
    _, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, output_loading_info=True)
    assert {kind: found for kind, found in info.items() if found} == {}


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_first_deepseek_layer_is_dense(family: Family) -> None:
    names = {plan.name for plan in tensor_plans(CheckpointSpec(family))}
    assert "model.layers.0.mlp.gate_proj.weight" in names
    assert not any(name.startswith("model.layers.0.mlp.experts") for name in names)


def test_every_expert_shard_and_row_has_its_own_scale(tmp_path: Path) -> None:
    tensors = read(build(CheckpointSpec("qwen3_moe"), tmp_path))
    linears = [t for name, t in tensors.items() if name.endswith("_proj.weight")]
    assert len({t.float().std().item() for t in linears}) == len(linears)
    # A maximum in bf16 has 7 bits of mantissa, so a few tensors of a whole checkpoint do meet.
    assert len({t.abs().max().item() for t in linears}) >= 0.8 * len(linears)
    for tensor in linears:
        row_scales = tensor.float().abs().amax(dim=1)
        assert row_scales.max() > 2 * row_scales.min()


def test_gate_and_up_of_one_expert_have_clearly_different_scales(tmp_path: Path) -> None:
    tensors = read(build(CheckpointSpec("qwen3_moe"), tmp_path))
    ratios = []
    for expert in range(8):
        gate, up = (tensors[f"model.layers.0.mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up"))
        assert gate.abs().max() != up.abs().max()
        ratios.append((gate.float().std() / up.float().std()).log2().abs().item())
    assert max(ratios) > 0.5


def test_values_do_not_depend_on_files_or_their_order(tmp_path: Path) -> None:
    one = read(build(CheckpointSpec("deepseek_v3"), tmp_path))
    many = read(build(CheckpointSpec("deepseek_v3", files=5, assignment="shuffled", file_names="shuffled"), tmp_path))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_equal_specs_give_equal_bytes_and_a_seed_changes_them(tmp_path: Path) -> None:
    spec = CheckpointSpec("qwen3")
    first, second = build(spec, tmp_path / "a"), build(spec, tmp_path / "b")
    files = sorted(file.name for file in first.iterdir())
    assert files == sorted(file.name for file in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    other = build(CheckpointSpec("qwen3", seed=1), tmp_path / "a")
    assert (other / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()


def test_a_finished_checkpoint_is_not_written_again(tmp_path: Path) -> None:
    path = build(CheckpointSpec("qwen3"), tmp_path)
    written = (path / "model.safetensors").stat().st_mtime_ns
    assert build(CheckpointSpec("qwen3"), tmp_path) == path
    assert (path / "model.safetensors").stat().st_mtime_ns == written
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_every_field_of_the_spec_is_part_of_the_path(tmp_path: Path) -> None:
    specs = [
        CheckpointSpec("qwen3"),
        CheckpointSpec("qwen3", files=2),
        CheckpointSpec("qwen3", files=2, assignment="round_robin"),
        CheckpointSpec("qwen3", files=2, file_names="shuffled"),
        CheckpointSpec("qwen3", tied_embeddings=True),
        CheckpointSpec("qwen3", overrides=(("num_hidden_layers", 2),)),
        CheckpointSpec("qwen3", stored="fp8"),
        CheckpointSpec("qwen3", container="bin"),
        CheckpointSpec("qwen3", seed=1),
    ]
    assert len({checkpoint_path(spec, tmp_path) for spec in specs}) == len(specs)


@pytest.mark.parametrize("assignment", ["sequential", "round_robin", "shuffled"])
def test_index_says_where_each_tensor_is(assignment: str, tmp_path: Path) -> None:
    path = build(CheckpointSpec("qwen3_moe", files=4, assignment=assignment), tmp_path)  # type: ignore[arg-type]
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file.name))
    assert index_of(path) == found
    assert len(set(found.values())) == 4
    total = json.loads((path / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == sum(tensor.nbytes for tensor in read(path).values())


def test_a_single_file_has_no_index(tmp_path: Path) -> None:
    path = build(CheckpointSpec("qwen3"), tmp_path)
    assert [file.name for file in path.glob("model*")] == ["model.safetensors"]


def test_sequential_files_keep_model_order_and_similar_sizes() -> None:
    spec = CheckpointSpec("qwen3_moe", files=6)
    sizes = {plan.name: plan.nbytes for plan in tensor_plans(spec)}
    plan = file_plan(spec)
    assert [name for names in plan.values() for name in names] == list(sizes)
    assert list(plan) == sorted(plan)
    bytes_per_file = [sum(sizes[name] for name in names) for names in plan.values()]
    assert max(bytes_per_file) < 1.5 * min(bytes_per_file)


def test_round_robin_puts_the_shards_of_an_expert_in_different_files(tmp_path: Path) -> None:
    weight_map = index_of(build(CheckpointSpec("qwen3_moe", files=3, assignment="round_robin"), tmp_path))
    prefix = "model.layers.1.mlp.experts.3"
    assert len({weight_map[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down")}) == 3


def test_shuffled_file_names_break_model_order_when_sorted() -> None:
    spec = CheckpointSpec("qwen3", files=5, file_names="shuffled")
    plan = file_plan(spec)
    assert sorted(plan) == sorted(file_plan(CheckpointSpec("qwen3", files=5)))
    read_order = [name for file in sorted(plan) for name in plan[file]]
    assert read_order != [tensor.name for tensor in tensor_plans(spec)]


def test_more_files_than_tensors_is_an_error() -> None:
    with pytest.raises(ValueError, match="ask for fewer files"):
        file_plan(CheckpointSpec("qwen3", files=10_000))


def test_every_file_count_up_to_the_tensor_count_leaves_no_file_empty() -> None:
    tensors = len(tensor_plans(CheckpointSpec("qwen3")))
    for files in range(1, tensors + 1):
        assert all(file_plan(CheckpointSpec("qwen3", files=files)).values())


def test_tied_embeddings_leave_the_head_out(tmp_path: Path) -> None:
    path = build(CheckpointSpec("qwen3", tied_embeddings=True), tmp_path)
    assert "lm_head.weight" not in read(path)
    assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is True


def test_nextn_layer_follows_the_last_decoder_layer() -> None:
    spec = CheckpointSpec("deepseek_v3", overrides=(("num_nextn_predict_layers", 1),))
    names = {plan.name for plan in tensor_plans(spec)}
    assert {"model.layers.3.eh_proj.weight", "model.layers.3.shared_head.head.weight"} <= names


def test_bin_container_holds_the_same_tensors(tmp_path: Path) -> None:
    wanted = read(build(CheckpointSpec("qwen3", files=2), tmp_path))
    path = build(CheckpointSpec("qwen3", files=2, container="bin"), tmp_path)
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.bin"):
        found.update(torch.load(file, weights_only=True))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_fp8_stores_one_scale_a_tensor(tmp_path: Path) -> None:
    plain = read(build(CheckpointSpec("qwen3_moe"), tmp_path))
    path = build(CheckpointSpec("qwen3_moe", stored="fp8"), tmp_path)
    stored, name = read(path), "model.layers.0.mlp.experts.0.gate_proj.weight"
    assert stored[name].dtype == torch.float8_e4m3fn
    restored = stored[name].float() * stored[f"{name}_scale"]
    torch.testing.assert_close(restored, plain[name].float(), rtol=0.07, atol=1e-3)
    assert stored["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    assert json.loads((path / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"


def test_fp8_block_stores_a_scale_for_each_128_by_128_block(tmp_path: Path) -> None:
    plain = read(build(CheckpointSpec("deepseek_v3"), tmp_path))
    stored, name = (
        read(build(CheckpointSpec("deepseek_v3", stored="fp8_block"), tmp_path)),
        "model.layers.1.mlp.experts.0",
    )
    for shard in ("gate", "up", "down"):
        weight, scale = (stored[f"{name}.{shard}_proj.weight{end}"] for end in ("", "_scale_inv"))
        rows, columns = weight.shape
        assert scale.shape == (-(-rows // 128), -(-columns // 128))
        spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
        wanted = plain[f"{name}.{shard}_proj.weight"].float()
        torch.testing.assert_close(weight.float() * spread, wanted, rtol=0.07, atol=1e-3)


def test_tokenizer_round_trips_text_and_decodes_every_id(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = build(CheckpointSpec("qwen3"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    text = "The answer is 42: naïve café, 你好!\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    vocab_size = json.loads((path / "config.json").read_text())["vocab_size"]
    assert len(tokenizer) == vocab_size
    assert all(token is not None for token in tokenizer.convert_ids_to_tokens(list(range(vocab_size))))
    assert tokenizer.eos_token_id == json.loads((path / "config.json").read_text())["eos_token_id"]


def test_chat_template_writes_one_turn_a_message(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(build(CheckpointSpec("qwen3"), tmp_path))
    messages = [{"role": "user", "content": "hi"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("family", "size", "at_least", "at_most"),
    [
        ("qwen3_moe", "demo", 0.9e9, 1.2e9),
        ("deepseek_v3", "demo", 0.9e9, 1.2e9),
        ("qwen3_moe", "bench_2g", 2e9, 3e9),
        ("qwen3_moe", "bench_4g", 4e9, 5e9),
        ("deepseek_v3", "bench_2g", 2e9, 3e9),
        ("deepseek_v3", "bench_4g", 4e9, 5e9),
    ],
)
def test_sizes_hold_what_they_promise(family: Family, size: str, at_least: float, at_most: float) -> None:
    spec = CheckpointSpec(family, size)
    assert at_least <= sum(plan.nbytes for plan in tensor_plans(spec)) <= at_most
    dims = SIZES[family][size]
    if size.startswith("bench"):
        assert dims.get("num_experts", dims.get("n_routed_experts")) == 64


def test_an_unknown_size_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="tiny, demo"):
        CheckpointSpec("qwen3", size="huge")
