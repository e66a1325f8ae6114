# SPDX-License-Identifier: Apache-2.0
"""Parameters without memory: how upstream is made to create them, and how they get memory after all."""

from __future__ import annotations

from collections.abc import Callable
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


def twin(placeholder: torch.nn.Parameter, values: torch.Tensor) -> torch.nn.Parameter:
    """Another parameter of the same class and with the same attributes, over ``values``."""
    other = torch.nn.Parameter(values, requires_grad=placeholder.requires_grad)
    other.__class__ = placeholder.__class__
    other.__dict__.update(placeholder.__dict__)
    return other


def materialize(placeholder: torch.nn.Parameter, values: torch.Tensor) -> torch.nn.Parameter:
    """Make ``placeholder`` hold ``values``, in place: whoever keeps a reference sees the real parameter from now on.

    Returns:
        What keeps the storage that writes to the placeholder were recognized by; swapping the two undoes it.
    """
    other = twin(placeholder, values)
    torch.utils.swap_tensors(placeholder, other)
    return other


def set_loader(placeholder: torch.nn.Parameter, loader: Callable[..., Any]) -> None:
    """Give a parameter another weight loader."""
    # SGLang's own parameter classes have weight_loader as a read-only property over _weight_loader.
    attribute = (
        "_weight_loader" if isinstance(getattr(type(placeholder), "weight_loader", None), property) else "weight_loader"
    )
    setattr(placeholder, attribute, loader)
