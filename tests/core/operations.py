# SPDX-License-Identifier: Apache-2.0
"""Operations that something dispatches: on a device, each that is no view is a launch, or an allocation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Counts what is dispatched within it, views excluded.

    Attributes:
        seen: how often each operation was, by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.seen.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # "prim::device" and the like are questions, and a view changes no memory.
        if not (func.is_view or func.namespace == "prim"):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], Any]) -> Counter[str]:
    """What ``run`` dispatches, views excluded: how often each operation."""
    with Operations() as found:
        run()
    return found.seen


def launches(seen: Counter[str]) -> int:
    """How many of these operations are launches on a device: all but allocations."""
    return sum(count for name, count in seen.items() if not name.startswith(("aten.empty", "aten.new_empty")))
