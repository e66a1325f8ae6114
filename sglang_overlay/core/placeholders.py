# SPDX-License-Identifier: Apache-2.0
"""Let upstream create a layer's parameters without allocating the high-precision weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PlaceholderAllocation(TorchDispatchMode):
    """Puts uninitialized tensors of the high-precision dtype on the meta device; all else is allocated as asked for.

    Weights are what upstream creates with ``torch.empty`` in the model's dtype. Scales, biases in float32 and whatever
    is created with a value keep real memory, so nothing but the weights has to be known here.

    Args:
        dtype: the dtype weights are loaded in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self.device: torch.device | None = None
        """Where upstream wanted the weights, once one has been created."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and kwargs.get("dtype") is self._dtype:
            self.device = torch.device(kwargs.get("device") or "cpu")
            kwargs = {**kwargs, "device": torch.device("meta")}
        return func(*args, **kwargs)
