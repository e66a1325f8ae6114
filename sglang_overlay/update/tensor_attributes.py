# SPDX-License-Identifier: Apache-2.0
"""Keep tensors that upstream computes from weights in the same memory during an update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sglang_overlay.load.model_tensors import MOST_NESTED, TORCH_ATTRIBUTES
from sglang_overlay.update.undo import UndoLog


class TensorAttributes:
    """Tensors that modules hold as attributes, such as MLA's ``w_kc``, or in lists and dicts; no parameters or buffers.

    Tracked by name, since upstream may replace the lists and dicts as well.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._found = {name: tensor for name, _, _, tensor in slots(model) if not tensor.is_meta}

    def keep_memory(self, undo: UndoLog) -> list[str]:
        """Where upstream has replaced a tensor, copy the new values into the old memory.

        Args:
            undo: keeps what is overwritten.

        Returns:
            Names of tensors whose shape or dtype has changed; they keep their old values.
        """
        changed, moved = [], []
        for name, holder, key, new in list(slots(self._model)):
            old = self._found.get(name, new)
            if new is old:
                continue
            # In any case, whether or not the values can be copied.
            holder[key] = old
            # No data: computed from a weight that was not sent in this update and so has not changed.
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


def slots(model: torch.nn.Module) -> Iterator[tuple[str, Any, Any, torch.Tensor]]:
    """Where modules hold tensors that are not parameters or buffers: name, container, index or key, and tensor."""
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
