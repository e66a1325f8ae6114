# SPDX-License-Identifier: Apache-2.0
"""The scales of the key-value cache, which a server that sleeps without a backup of its weights loses."""

from __future__ import annotations

import torch

SCALES = ("k_scale", "v_scale")


def restore(model: torch.nn.Module) -> None:
    """Write the scales again. SGLang's ``BaseKVCacheMethod`` keeps each as a number as well, ``k_scale_float``.

    Under ``--quantization fp8`` attention layers have them as parameters, which checkpoints hardly ever bring. Upstream
    would take what a resumed memory happens to hold for scales that were loaded.
    """
    for module in model.modules():
        for name in SCALES:
            scale, value = getattr(module, name, None), getattr(module, f"{name}_float", None)
            if isinstance(scale, torch.Tensor) and isinstance(value, float):
                scale.data.fill_(value)
