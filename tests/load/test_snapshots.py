# SPDX-License-Identifier: Apache-2.0
"""What models note down while loading refers to the parameters that serve, not to those they were loaded into."""

from __future__ import annotations

import pytest
from workbench.loads.loads import compare
from workbench.quality import published
from workbench.quality.architectures import PUBLISHED


@pytest.fixture
def build(workers, checkpoint_folder):
    """Makes the tiny checkpoint of an architecture."""
    return lambda architecture: published.build(architecture, PUBLISHED[architecture], checkpoint_folder, workers)


def prints_under(result, name):
    return {key: print_ for key, print_ in result.ranks[0].tensors.items() if key.startswith(f"{name}[")}


@pytest.mark.parametrize(
    ("architecture", "attribute"),
    [("BailingMoeForCausalLM", "routed_experts_weights_of_layer"), ("SDARMoeForCausalLM", "_cached_params_dict")],
)
def test_models_differ_from_stock_only_where_stock_keeps_its_bf16_weights(architecture, attribute, both, build):
    stock, result, _ = both(build(architecture))
    differences = compare(stock, result)
    assert differences
    assert all(line.startswith(f"rank 0: {attribute}[") for line in differences)
    assert result.ranks[0].model_bytes < stock.ranks[0].model_bytes


def test_expert_weights_that_eplb_moves_are_those_served(both, build):
    _, result, _ = both(build("BailingMoeForCausalLM"))
    served = [
        result.ranks[0].tensors[f"model.layers.1.mlp.experts.{name}"].sha256
        for name in ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale")
    ]
    moved = prints_under(result, "routed_experts_weights_of_layer")
    assert sorted(print_.sha256 for print_ in moved.values()) == sorted(served)
