# SPDX-License-Identifier: Apache-2.0
"""Outliers change the weights and nothing else."""

from __future__ import annotations

import pytest
import torch
from workbench.loads.checkpoints import model_config, tensor_plans
from workbench.quality.outliers import add_outliers
from workbench.quality.small_models import FAMILIES, build_model, spec_of


def state(model, names):
    """A model's weights under published names, as ``save_pretrained`` writes them."""
    experts = {
        f"{module}.{number}.{part}.weight": values
        for module, tensors in _fused_experts(model).items()
        for number in range(len(tensors["down_proj"]))
        for part, values in zip(
            ("gate_proj", "up_proj", "down_proj"),
            (*tensors["gate_up_proj"][number].chunk(2), tensors["down_proj"][number]),
            strict=True,
        )
    }
    return {name: {**model.state_dict(), **experts}[name] for name in names}


def _fused_experts(model):
    found = {}
    for name, tensor in model.state_dict().items():
        module, _, last = name.rpartition(".")
        if last in ("gate_up_proj", "down_proj"):
            found.setdefault(module, {})[last] = tensor
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_outliers_leave_what_a_model_computes(family):
    torch.manual_seed(0)
    model = build_model(model_config(spec_of(family))).eval()
    tokens = torch.randint(1000, (2, 32))
    before = state(model, [plan.name for plan in tensor_plans(spec_of(family))])
    after = add_outliers(before)
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        for name, tensor in before.items():
            tensor.copy_(after[name])  # The model's own memory.
        found = model(input_ids=tokens).logits
    assert (expected - found).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_projection_that_reads_a_norm_has_outliers(family):
    plans = [plan for plan in tensor_plans(spec_of(family)) if plan.name.endswith("_proj.weight")]
    norms = {plan.name: torch.ones(plan.shape) for plan in tensor_plans(spec_of(family)) if plan.kind == "norm"}
    made = add_outliers({**norms, **{plan.name: torch.ones(plan.shape) for plan in plans}})
    untouched = [
        name for name, tensor in made.items() if name.endswith("_proj.weight") and tensor.unique().numel() == 1
    ]
    assert all("o_proj" in name for name in untouched)
