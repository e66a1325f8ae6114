# SPDX-License-Identifier: Apache-2.0
"""Make upstream create weights without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PlaceholderAllocation(TorchDispatchMode):
    """Puts uninitialized tensors of the high-precision dtype on the meta device; all others are allocated as usual.

    Upstream creates weights with ``torch.empty`` in the model's dtype. Float32 scales and biases, and tensors created
    with a value, keep real memory.

    Args:
        dtype: the dtype that weights are loaded in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self.device: torch.device | None = None
        """The device upstream asked for, once it has created a weight."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and kwargs.get("dtype") is self._dtype:
            self.device = torch.device(kwargs.get("device") or "cpu")
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*args, **kwargs)
