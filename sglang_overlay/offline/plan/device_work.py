# SPDX-License-Identifier: Apache-2.0
"""Count a load's kernel launches, copies from the host, and waits for the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sglang_overlay.offline.plan.job import DeviceWork

aten = torch.ops.aten

ALLOCATIONS = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.empty_permuted.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
"""Operations that create an uninitialized tensor."""
_WAITS = frozenset({aten._local_scalar_dense.default, aten.nonzero.default})
"""Operations whose result the host needs: a number, or the number of elements found."""


def count(work: DeviceWork, device: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Count an operation, not a view, if it involves ``device``. Not thread-safe."""
    if func in ALLOCATIONS:
        return
    found = [tensor.device.type for tensor in _tensors(args)]
    target = torch.device(kwargs["device"]).type if kwargs.get("device") else None
    if func is aten.copy_.default and isinstance(args[1], torch.Tensor):
        _count_copy(work, device, target=found[0], source=found[1])
    elif func is aten._to_copy.default:
        _count_copy(work, device, target=target or found[0], source=found[0])
    elif device in (target, *found):
        work.launches += func is not aten._local_scalar_dense.default
        work.waits += func in _WAITS


def _count_copy(work: DeviceWork, device: str, *, target: str, source: str) -> None:
    work.launches += target == source == device
    work.uploads += target == device != source
    work.waits += source == device != target


def _tensors(args: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in args:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
