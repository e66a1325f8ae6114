"""LoRA adapters made by script, with random weights, in the layout that ``peft`` saves."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_RANK = 4


def build(checkpoint: Path, folder: Path) -> Path:
    """Write an adapter for all attention and MLP layers of a checkpoint in safetensors, and return `folder`."""
    from safetensors.torch import save_file
    from workbench.loads.updates import tensors_of

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in tensors_of(checkpoint):
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] not in _TARGETS:
            continue
        rows, columns = weight.shape
        down = torch.randn(_RANK, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, _RANK, generator=generator) / _RANK**0.5
        tensors[f"base_model.model.{layer}.lora_A.weight"] = down.to(weight.dtype)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = up.to(weight.dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK, "target_modules": _TARGETS, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
