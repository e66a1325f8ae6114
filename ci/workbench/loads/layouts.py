"""What a model's parameters would be called and measure in a checkpoint that stores each fused part by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True)
class WeightLayout:
    """One parameter of a model.

    Args:
        parts: rows of each of the matrices that SGLang's layer fuses, e.g. of q, k and v; empty if it is one matrix.
        is_gated: of experts: whether ``w13`` holds two matrices for each.
        is_unwritten: whether a value is NaN, the filling of memory that nobody has written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[int, ...] = ()
    is_gated: bool = True
    is_unwritten: bool = False


def weight_layouts(model: torch.nn.Module) -> Iterator[WeightLayout]:
    """The layout of each parameter; one that several modules share comes once."""
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        parts = _fused_parts(module)
        yield WeightLayout(
            name,
            tuple(parameter.shape),
            parameter.dtype,
            parts if parameter.dim() and sum(parts) == parameter.shape[0] else (),
            bool(getattr(getattr(module, "moe_runner_config", None), "is_gated", True)),
            parameter.is_floating_point() and bool(parameter.isnan().any()),
        )


def _fused_parts(module: Any) -> tuple[int, ...]:
    """Rows of what upstream's ``QKVParallelLinear`` and ``MergedColumnParallelLinear`` (linear.py) hold, at TP 1."""
    if hasattr(module, "total_num_kv_heads") and hasattr(module, "head_size"):
        value_size = getattr(module, "v_head_size", module.head_size)
        key_rows, value_rows = module.total_num_kv_heads * module.head_size, module.total_num_kv_heads * value_size
        return (module.total_num_heads * module.head_size, key_rows, value_rows)
    sizes = getattr(module, "output_sizes", None)
    return tuple(sizes) if isinstance(sizes, (list, tuple)) and len(sizes) > 1 else ()
