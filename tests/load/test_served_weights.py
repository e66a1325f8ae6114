from __future__ import annotations

import gc
import weakref

import pytest
import torch

from sglang_overlay.load.served_weights import ServedWeights, layer_of


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(8, 4)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.layers[1].register_buffer("bias_of_experts", torch.ones(3))
        # As MLA's w_kc, and what is held in lists.
        self.layers[1].derived = torch.zeros(2, 2)
        self.layers[1].parts = [torch.zeros(1), {"a": torch.zeros(1)}]
        self.placeholder = torch.empty(3, device="meta")
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def checksum(weights):
    weights.compute_checksum()
    return weights.checksum


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.experts.w13_weight", "model.layers.12"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("visual.blocks.3.norm1.weight", "visual.blocks.3"),
        ("model.layers.1.self_attn.w_kc", "model.layers.1"),
        ("weight", "weight"),
    ],
)
def test_layer_of(name, layer):
    assert layer_of(name) == layer


def test_each_tensor_counts_and_only_its_layer_changes(model):
    weights = ServedWeights(model, "target")
    before = checksum(weights)
    assert list(before.layers) == ["embed", "layers.0", "layers.1"]
    assert before.bytes == 4 * (8 * 4 + 2 * (4 * 4 + 4) + 3 + 4 + 1 + 1)
    for tensor, layer in (
        (model.embed.weight, "embed"),
        (model.layers[0].bias, "layers.0"),
        (model.layers[1].weight, "layers.1"),
        (model.layers[1].bias_of_experts, "layers.1"),
        (model.layers[1].derived, "layers.1"),
        (model.layers[1].parts[1]["a"], "layers.1"),
    ):
        with torch.no_grad():
            old = tensor.clone()
            tensor.view(-1)[-1] += 1
        after = checksum(weights)
        assert after.total != before.total
        assert [name for name in before.layers if before.layers[name] != after.layers[name]] == [layer]
        with torch.no_grad():
            tensor.copy_(old)
    assert checksum(weights).total == before.total


def test_equal_models_have_equal_checksums(model):
    torch.manual_seed(0)
    other = Model()
    assert checksum(ServedWeights(other, "target")).total == checksum(ServedWeights(model, "draft")).total


def test_dtype_and_shape_count(model):
    weights, held = ServedWeights(model, "target"), model.layers[1].derived
    found = set()
    for view in (held, held.view(4), held.view(torch.int32)):
        model.layers[1].derived = view
        found.add(checksum(weights).total)
    assert len(found) == 3


def test_what_a_model_makes_later_is_no_weight(model):
    weights = ServedWeights(model, "target")
    before = checksum(weights).total
    model.layers[0].scratch = torch.ones(5)
    model.layers[0].register_buffer("counter", torch.ones(1))
    assert checksum(weights).total == before


def test_module_is_found_within_a_wrapper_that_it_gets_later(model):
    """As SGLang's LoRA layers."""
    weights = ServedWeights(model, "target")
    before = checksum(weights)
    model.layers[0] = torch.nn.Sequential(model.layers[0])
    assert checksum(weights).layers == before.layers
    with torch.no_grad():
        model.layers[0][0].bias += 1
    assert checksum(weights).layers["layers.0"] != before.layers["layers.0"]


def test_tensor_that_takes_the_place_of_another_is_read(model):
    weights = ServedWeights(model, "target")
    before = checksum(weights).total
    model.layers[1].derived = torch.ones(2, 2)
    assert checksum(weights).total != before
    model.layers[1].derived = torch.zeros(2, 2)
    assert checksum(weights).total == before


def test_record_keeps_no_model_alive():
    model = Model()
    weights, gone = ServedWeights(model, "target"), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert checksum(weights).layers == {}
