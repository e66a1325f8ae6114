# SPDX-License-Identifier: Apache-2.0
"""Placeholders: make upstream create weights without memory, and give them memory later."""

from __future__ import annotations

from collections.abc import Callable
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


def twin(placeholder: torch.nn.Parameter, values: torch.Tensor) -> torch.nn.Parameter:
    """Another parameter of the same class and with the same attributes, over ``values``."""
    other = torch.nn.Parameter(values, requires_grad=placeholder.requires_grad)
    other.__class__ = placeholder.__class__
    other.__dict__.update(placeholder.__dict__)
    return other


def materialize(placeholder: torch.nn.Parameter, values: torch.Tensor) -> torch.nn.Parameter:
    """Make ``placeholder`` hold ``values``, in place, so that all references to it see the real parameter.

    Returns:
        A parameter with the placeholder's meta storage, by which writes were recognized; swapping the two undoes this.
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
