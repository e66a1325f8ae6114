# SPDX-License-Identifier: Apache-2.0
"""Make upstream create weights without memory, or with hardly any."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class WeightAllocation(TorchDispatchMode, abc.ABC):
    """Creates uninitialized tensors of the high-precision dtype in its own way; all others are allocated as usual.

    Upstream creates weights with ``torch.empty`` in the model's dtype. Float32 scales and biases, and tensors created
    with a value, keep real memory.

    Args:
        dtype: the dtype that weights are loaded in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype

    @abc.abstractmethod
    def allocate(self, empty: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """A weight in place of ``empty(*args, **kwargs)``."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.empty.memory_format and kwargs.get("dtype") is self._dtype:
            return self.allocate(func, args, kwargs)
        return func(*args, **kwargs)


class PlaceholderAllocation(WeightAllocation):
    """Puts weights on the meta device."""

    device: torch.device | None = None
    """The device upstream asked for, once it has created a weight."""

    def allocate(self, empty: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        self.device = torch.device(kwargs.get("device") or "cpu")
        placeholder: torch.Tensor = empty(*args, **{**kwargs, "device": torch.device("meta")})
        return placeholder


class OneElementAllocation(WeightAllocation):
    """Gives weights the memory of one element, on the device they belong on: shows what upstream makes of that."""

    def allocate(self, empty: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        weight: torch.Tensor = empty([1] * len(args[0]), **kwargs)
        return weight.expand(args[0])
