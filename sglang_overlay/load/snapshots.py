# SPDX-License-Identifier: Apache-2.0
"""Snapshots that a model took of its parameters before they were quantized.

``bailing_moe.py`` and ``sarvam_moe.py`` build ``routed_experts_weights_of_layer`` at the end of ``load_weights`` from
``parameter.data``. In stock these are the bf16 weights, which therefore stay in memory, and which expert rebalancing
would move instead of the fp8 ones; while streaming they are placeholders. All other models build it when it is first
needed (``LazyValue``), from the fp8 parameters.

``sdar_moe.py`` and ``interns1pro.py`` keep ``_cached_params_dict``, in which ``load_weights`` looks up parameters; in
stock this keeps all bf16 weights alive. They create it if it is missing.
"""

from __future__ import annotations

from typing import Any

import torch

_ATTRIBUTE = "routed_experts_weights_of_layer"
_CACHE = "_cached_params_dict"
NOTED = (_ATTRIBUTE, _CACHE)
"""Attributes of models in which stock keeps bf16 weights."""


def refresh(model: torch.nn.Module) -> None:
    """Rebuild snapshots of experts' weights that hold placeholders, and drop caches of parameters that do."""
    for module in model.modules():
        if _is_placeholder(vars(module).get(_CACHE, {}).values()):
            delattr(module, _CACHE)
    noted = vars(model).get(_ATTRIBUTE)
    if not isinstance(noted, dict) or not any(_is_placeholder(weights) for weights in noted.values()):
        return
    layers: Any = model.get_submodule("model.layers")
    setattr(model, _ATTRIBUTE, {number: layers[number].mlp.get_moe_weights() for number in noted})


def _is_placeholder(weights: Any) -> bool:
    return any(isinstance(weight, torch.Tensor) and weight.is_meta for weight in weights)
