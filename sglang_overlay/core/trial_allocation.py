# SPDX-License-Identifier: Apache-2.0
"""Make upstream create weights that need hardly any memory, to see what it makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class OneElementAllocation(TorchDispatchMode):
    """Gives uninitialized tensors of the high-precision dtype the memory of one element, on the device they belong on.

    Shows what upstream makes of a weight's device, without the weight's memory.

    Args:
        dtype: the dtype that weights are loaded in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and kwargs.get("dtype") is self._dtype:
            return func([1] * len(args[0]), **kwargs).expand(args[0])
        return func(*args, **kwargs)
