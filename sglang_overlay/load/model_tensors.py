# SPDX-License-Identifier: Apache-2.0
"""Every tensor that a model holds, wherever it holds it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

TORCH_ATTRIBUTES = frozenset({"_parameters", "_buffers", "_modules"})
"""Where torch keeps what a module holds; all other attributes are the model's own."""
MOST_NESTED = 3
"""Lists and dicts within each other in which tensors are looked for."""


def tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, buffer and tensor in an attribute (MLA's ``w_kc``) of a model, with its name."""
    for prefix, module in model.named_modules():
        attributes = {name: value for name, value in vars(module).items() if name not in TORCH_ATTRIBUTES}
        for values in (module._parameters, module._buffers, attributes):
            for name, value in values.items():
                yield from _tensors_in(value, f"{prefix}.{name}" if prefix else name, MOST_NESTED)


def stored_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages; of meta tensors, what they would take. Shared memory is counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr() or storage._cdata: storage.nbytes() for storage in storages}.values())


def _tensors_in(value: Any, name: str, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple, dict)) and depth:
        items = list(value.items() if isinstance(value, dict) else enumerate(value))
        for key, item in items:
            yield from _tensors_in(item, f"{name}[{key!r}]", depth - 1)
