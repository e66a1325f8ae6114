# SPDX-License-Identifier: Apache-2.0
"""Every tensor that a model holds, wherever it holds it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

TORCH_ATTRIBUTES = frozenset({"_parameters", "_buffers", "_modules"})
"""Where torch keeps what a module holds; all other attributes are the model's own."""
MOST_NESTED = 3
"""Lists and dicts within each other in which tensors are looked for."""


_HOLDING = (torch.Tensor, list, tuple, dict)


def tensors_of(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter, buffer and tensor in an attribute (MLA's ``w_kc``) of a model, with its name."""
    for prefix, module in model.named_modules():
        for name, value in _held(module):
            yield from _tensors_in(value, f"{prefix}.{name}" if prefix else name, MOST_NESTED)


class TensorHolders:
    """Where a model holds tensors now, to find those that will be there later.

    What a model holds only later is left out: scratch memory, for one. A module is found wherever it is then, as within
    SGLang's LoRA layers.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        # Weak, since a record of a model must not keep it alive.
        self._holders = [
            (prefix, weakref.ref(module), [key for key, value in _held(module) if _holds_tensors(value)])
            for prefix, module in model.named_modules()
        ]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every such tensor that there still is, with the name that it had."""
        for prefix, reference, keys in self._holders:
            module = reference()
            values = {} if module is None else dict(_held(module))
            for key in keys:
                yield from _tensors_in(values.get(key), f"{prefix}.{key}" if prefix else key, MOST_NESTED)


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


def _held(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """What may hold tensors of what a module itself holds. A model has some hundred attributes that cannot for one."""
    return [
        (name, value)
        for values in (module._parameters, module._buffers, vars(module))
        for name, value in values.items()
        if isinstance(value, _HOLDING) and (values is not vars(module) or name not in TORCH_ATTRIBUTES)
    ]


def _holds_tensors(value: Any) -> bool:
    return next(_tensors_in(value, "", MOST_NESTED), None) is not None
