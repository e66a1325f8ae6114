# SPDX-License-Identifier: Apache-2.0
"""What a load asks of a device beside memory: launches, copies from the host, and waits for its answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

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
"""Operations that make a tensor without contents."""
_WAITS = frozenset({aten._local_scalar_dense.default, aten.nonzero.default})
"""Operations whose result the host needs: a number, or how much was found."""


@dataclass
class DeviceWork:
    """Counts operations on one device. Not for several threads at once.

    Attributes:
        launches: operations that run on the device, a launch each, copies within it included; a kernel of SGLang's
            counts as many as it launches.
        uploads: copies from the host.
        waits: for the device, by the host: its numbers, and copies to the host.
    """

    launches: int = 0
    uploads: int = 0
    waits: int = 0

    def note(self, device: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count an operation that is no view, if it is one of ``device``'s."""
        if func in ALLOCATIONS:
            return
        found = [tensor.device.type for tensor in _tensors(args)]
        target = torch.device(kwargs["device"]).type if kwargs.get("device") else None
        if func is aten.copy_.default and isinstance(args[1], torch.Tensor):
            self._copy(device, target=found[0], source=found[1])
        elif func is aten._to_copy.default:
            self._copy(device, target=target or found[0], source=found[0])
        elif device in (target, *found):
            self.launches += func is not aten._local_scalar_dense.default
            self.waits += func in _WAITS

    def _copy(self, device: str, *, target: str, source: str) -> None:
        self.launches += target == source == device
        self.uploads += target == device != source
        self.waits += source == device != target


def _tensors(args: Iterable[Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in args:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value)
    return found
