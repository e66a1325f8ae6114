# SPDX-License-Identifier: Apache-2.0
"""Tensors that upstream computes from weights, and that an update leaves in the memory that they have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sglang_overlay.load.model_tensors import MOST_NESTED, TORCH_ATTRIBUTES
from sglang_overlay.update.undo import UndoLog


class TensorAttributes:
    """Tensors that modules hold as attributes, such as MLA's ``w_kc``, or in lists and dicts; no parameters or buffers.

    By name, since upstream may make the lists and dicts anew as well.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._found = {name: tensor for name, _, _, tensor in _slots(model) if not tensor.is_meta}

    def keep_memory(self, undo: UndoLog) -> list[str]:
        """Where upstream has put a new tensor in place of one, move its values into the old one's memory.

        Args:
            undo: keeps what is overwritten.

        Returns:
            Names of those that have got another form; they keep their old values too.
        """
        changed, moved = [], []
        for name, holder, key, new in list(_slots(self._model)):
            old = self._found.get(name, new)
            if new is old:
                continue
            # First of all, whatever becomes of the values.
            holder[key] = old
            # Without data: computed from a weight that did not come in this update, and so has not changed.
            if new.is_meta:
                continue
            if (new.shape, new.dtype) != (old.shape, old.dtype):
                changed.append(name)
            else:
                moved.append((old, new))
        for old, new in moved:
            undo.keep(old)
            with torch.no_grad():
                old.copy_(new)
        return changed


def _slots(model: torch.nn.Module) -> Iterator[tuple[str, Any, Any, torch.Tensor]]:
    """Where modules hold tensors beside parameters and buffers: name, list or dict, index or key, and the tensor."""
    for prefix, module in model.named_modules():
        attributes = vars(module)
        for key in [key for key in attributes if key not in TORCH_ATTRIBUTES]:
            yield from _slots_at(attributes, key, f"{prefix}.{key}" if prefix else key, MOST_NESTED)


def _slots_at(holder: Any, key: Any, name: str, depth: int) -> Iterator[tuple[str, Any, Any, torch.Tensor]]:
    value = holder[key]
    if isinstance(value, torch.Tensor):
        yield name, holder, key, value
    elif isinstance(value, (list, dict)) and depth:
        for inner in list(value) if isinstance(value, dict) else range(len(value)):
            yield from _slots_at(value, inner, f"{name}[{inner!r}]", depth - 1)
