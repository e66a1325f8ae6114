# SPDX-License-Identifier: Apache-2.0
"""Record the inputs of a loaded model's layers while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROWS = 512
"""Number of rows of a layer's input that are kept."""


@contextlib.contextmanager
def recorded_inputs(model: torch.nn.Module, file: Path | None) -> Iterator[None]:
    """Write the first input rows of each linear and expert layer, by the layer's name.

    Args:
        model: as SGLang has loaded it.
        file: a safetensors file for float32 ``[rows, columns]``, at most ``ROWS`` rows. None records nothing.
    """
    kept: dict[str, torch.Tensor] = {}
    hooks = [] if file is None else [_hook(name, layer, kept) for name, layer in _layers(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if file is not None:
        save_file(kept, file)


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in model.named_modules():
        if {"weight", "w13_weight"} & set(module._parameters) and hasattr(module, "quant_method"):
            yield name, module


def _hook(name: str, layer: torch.nn.Module, kept: dict[str, torch.Tensor]) -> Any:
    def keep(_layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if given is not None and given.is_floating_point():
            kept.setdefault(name, given.reshape(-1, given.shape[-1])[:ROWS].float().clone())

    return layer.register_forward_pre_hook(keep, with_kwargs=True)
