# SPDX-License-Identifier: Apache-2.0
"""Emulations of what SGLang calls of AMD's ``aiter`` while a model is loaded.

Paths are those of ROCm/aiter, read at commits 0122c48 (``aiter/ops/shuffle.py``) and 07e4337 (``csrc``). Arithmetic is
float32 in the kernels' order; their ``v_rcp_f32``, which may be off by one unit in the last place, is a division here.
"""

from __future__ import annotations

from typing import Any

import torch

from standin.aten import on_host
from standin.kernels import emulates, largest, on_current_device

LARGEST = {torch.float8_e4m3fnuz: 240.0, torch.float8_e4m3fn: 448.0}
"""``opus::finfo<fp8_t>::max()``: gfx942's fp8 is e4m3fnuz, gfx950's e4m3fn."""

_QUANT = "csrc/kernels/quant_kernels.cu"


@emulates("shuffle_weight", "aiter/ops/shuffle.py", "0122c48")
def shuffle_weight(x: torch.Tensor, layout: tuple[int, int] = (16, 16), use_int4: bool = False) -> torch.Tensor:
    """``[..., rows, columns]`` in the order in which matrix instructions read it.

    Tiles of 16 rows and 32 bytes of each; within a tile the first 16 bytes of all rows, then the second.
    """
    assert not use_int4, "int4 weights are not stood in for"
    rows, columns = layout
    width = 2 * columns
    lane = 16 // x.element_size()
    assert x.shape[-2] % rows == 0, f"{x.shape[-2]} % {rows} == {x.shape[-2] % rows}"
    assert x.shape[-1] % width == 0, f"{x.shape[-1]} % {width} == {x.shape[-1] % width}"
    tiles = x.view(-1, x.shape[-2] // rows, rows, x.shape[-1] // width, width // lane, lane)
    shuffled = tiles.permute(0, 1, 3, 4, 2, 5).contiguous().view(x.shape)
    shuffled.is_shuffled = True  # type: ignore[attr-defined]
    return shuffled


def _check(out: torch.Tensor, input: torch.Tensor, scale: torch.Tensor) -> None:
    on_current_device(out, input, scale)
    assert input.is_contiguous() and out.is_contiguous() and out.shape == input.shape
    assert out.dtype in LARGEST and scale.dtype == torch.float32


def _inverse(dtype: torch.dtype) -> torch.Tensor:
    """``inverted_DTYPE_MAX``: divided in double, kept in float32."""
    return torch.tensor(1.0 / LARGEST[dtype], dtype=torch.float32)


def _store(out: torch.Tensor, values: torch.Tensor, scale: torch.Tensor) -> None:
    """``values * (1 / scale)``, saturated, cast to the dtype of ``out``."""
    limit = LARGEST[out.dtype]
    product = torch.nan_to_num(values * (1.0 / scale), nan=limit).clamp(-limit, limit)
    on_host(out).copy_(product.to(out.dtype))


@emulates("static_per_tensor_quant", _QUANT, "07e4337")
def static_per_tensor_quant(out: torch.Tensor, input: torch.Tensor, scale: torch.Tensor) -> None:
    """All of ``input`` by the scale that is given, ``[1]``."""
    _check(out, input, scale)
    _store(out, on_host(input).float(), on_host(scale))


@emulates("dynamic_per_tensor_quant", _QUANT, "07e4337")
def dynamic_per_tensor_quant(out: torch.Tensor, input: torch.Tensor, scale: torch.Tensor) -> None:
    """All of ``input`` by one scale, ``[1]``, set to 0 first; then each row takes its maximum into it."""
    _check(out, input, scale)
    values = on_host(input).float()
    on_host(scale).copy_(largest(values) * _inverse(out.dtype))
    _store(out, values, on_host(scale))


@emulates("dynamic_per_token_scaled_quant", _QUANT, "07e4337")
def dynamic_per_token_scaled_quant(
    out: torch.Tensor,
    input: torch.Tensor,
    scales: torch.Tensor,
    scale_ub: torch.Tensor | None = None,
    shuffle_scale: bool = False,
    num_rows: torch.Tensor | None = None,
    num_rows_factor: int = 1,
) -> None:
    """Each row by its largest magnitude, with scales ``[rows, 1]``."""
    assert scale_ub is None and num_rows is None and not shuffle_scale
    _check(out, input, scales)
    values = on_host(input).float()
    on_host(scales).copy_(largest(values, dim=1) * _inverse(out.dtype))
    _store(out, values, on_host(scales))


@emulates("get_rope", "aiter/rotary_embedding.py", "0122c48")
def get_rope(*args: Any, **kwargs: Any) -> torch.nn.Module:
    """Stands where a model keeps its rotary embedding: tables that no checkpoint holds and no test looks at."""
    return torch.nn.Identity()
