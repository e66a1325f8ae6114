# SPDX-License-Identifier: Apache-2.0
"""Operations that something dispatches: on a device, each that is no view is a launch, or an allocation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Operations(TorchDispatchMode):
    """Counts what is dispatched within it, views excluded.

    Attributes:
        seen: how often each operation was, by its name.
        uploads: how many of them copied a tensor from the host to a device.
        waits: how many of them brought something from a device to the host, which waits for the device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.uploads = 0
        self.waits = 0

    @property
    def total(self) -> int:
        """All of them, allocations too."""
        return self.seen.total()

    @property
    def launches(self) -> int:
        """All but allocations."""
        return sum(count for name, count in self.seen.items() if not name.startswith(("aten.empty", "aten.new_empty")))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # "prim::device" and the like are questions, and a view changes no memory.
        if not (func.is_view or func.namespace == "prim"):
            self.seen[str(func)] += 1
            self._follow(func, args, result)
        return result

    def _follow(self, func: Any, args: Any, result: Any) -> None:
        if func is aten._local_scalar_dense.default:
            self.waits += not args[0].is_cpu
        elif func in (aten._to_copy.default, aten.copy_.default):
            source = args[0] if func is aten._to_copy.default else args[1]
            self.uploads += source.is_cpu and not result.is_cpu
            self.waits += result.is_cpu and not source.is_cpu


def operations(run: Callable[[], Any]) -> Operations:
    """What ``run`` dispatches."""
    with Operations() as found:
        run()
    return found
