# SPDX-License-Identifier: Apache-2.0
"""Loads differences between weights as verl's delta engine does (verl 0.9.1, delta_loader.py): NaN keeps a value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def load_differences(model: Any, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Have a model load tensors, of which NaN is left out. SGLang calls it as a custom weight loader."""
    copy = torch.Tensor.copy_

    def masked(self: torch.Tensor, source: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if source.is_floating_point() and self.shape == source.shape:
            source = torch.where(source.isnan(), self, source.to(self.dtype))
        return copy(self, source, *args, **kwargs)

    torch.Tensor.copy_ = masked  # type: ignore[method-assign, assignment]
    try:
        model.load_weights([(name, keep_every_other(tensor)) for name, tensor in named_tensors])
    finally:
        torch.Tensor.copy_ = copy  # type: ignore[method-assign]


def keep_every_other(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` with NaN in every other place."""
    kept = tensor.clone()
    kept.view(-1)[::2] = torch.nan
    return kept
