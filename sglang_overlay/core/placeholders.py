# SPDX-License-Identifier: Apache-2.0
"""Placeholders: parameters on the meta device, and how they get memory and another weight loader in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
