# SPDX-License-Identifier: Apache-2.0
"""Builders shared by the tests of streams: a stream over a placeholder, and what one-shot quantization gives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sglang_overlay.core.capture import storage_key
from sglang_overlay.core.captured_views import capture_of
from sglang_overlay.core.checkpoint_stream import CheckpointStream
from sglang_overlay.core.quantizers import RowKernelQuantizer, RowQuantizer, UnitQuantizer, WholeUnitQuantizer
from sglang_overlay.core.sources import CheckpointSources
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.core.stream import ParameterStream, Storage
from sglang_overlay.core.units import UnitGrid

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max


def quantize_unit(unit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale for all of ``unit``, in one go and without the project's own code."""
    amax = unit.abs().max().float().clamp(min=1e-12)
    scale = FP8_MAX / amax
    return (unit.float() * scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale.reciprocal()


def quantize_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One scale a row."""
    scale = rows.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
    return (rows.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


@dataclass
class Streamed:
    """A parameter that is being streamed, with everything a test wants to look at."""

    stream: ParameterStream
    placeholder: torch.nn.Parameter
    account: StagingAccount
    sources: CheckpointSources

    @cached_property
    def capture(self) -> Callable[[], AbstractContextManager[Any]]:
        return capture_of([self.placeholder], {storage_key(self.placeholder): self.stream})

    def equals(self, weight: torch.Tensor) -> bool:
        """Whether the result is, to the bit, that of quantizing ``weight`` unit by unit in one go."""
        values, scales = expected(self.stream, weight)
        stored = self.stream.storage
        return same_bytes(stored.weight, values) and same_bytes(stored.scale, scales)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def expected(stream: ParameterStream, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quantizer, weight = stream._quantizer, weight.contiguous()
    if isinstance(quantizer, RowQuantizer):
        by_kernel = isinstance(quantizer, RowKernelQuantizer)
        values, scales = quantizer.kernel(weight, weight.shape[-1]) if by_kernel else quantize_rows(weight)
        return values, scales.reshape(-1)
    function = quantizer.function if isinstance(quantizer, WholeUnitQuantizer) else quantize_unit
    units = weight if stream._grid.sliced else weight.unsqueeze(0)
    # Kernels want units at aligned addresses.
    quantized = [function(unit.clone()) for unit in units]
    return torch.stack([values.view(torch.uint8) for values, _ in quantized]).view(FP8), torch.stack(
        [scale.reshape(()) for _, scale in quantized]
    )


def per_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Streamed:
    """The whole parameter is one unit."""
    return _streamed(shape, UnitGrid.one(shape), one_scale(), dtype)


def per_expert(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Streamed:
    """Each index of the first dimension is a unit with one scale."""
    return _streamed(shape, UnitGrid.per_slice(shape), one_scale(), dtype)


def per_expert_by_kernel(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Streamed:
    """As ``per_expert``, each unit through a function that takes one whole unit."""
    return _streamed(shape, UnitGrid.per_slice(shape), WholeUnitQuantizer(quantize_unit), dtype)


def per_channel(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Streamed:
    """Each row is a unit with one scale."""
    return _streamed(shape, UnitGrid.per_slice(shape), one_scale_a_row(shape[0]), dtype)


def _streamed(shape, grid, quantizer, dtype) -> Streamed:
    return streamed(shape, grid, quantizer, (grid.count,), dtype)


def streamed(shape, grid, quantizer, scales, dtype: torch.dtype = torch.bfloat16) -> Streamed:
    """Any grid and quantizer; ``scales`` is the shape of the scales, units first."""
    placeholder = make_parameter(torch.empty(shape, dtype=dtype, device="meta"))
    storage = Storage(torch.zeros((grid.count, *grid.shape), dtype=FP8), torch.zeros(scales, dtype=torch.float32))
    account, sources = StagingAccount(), make_sources()
    stream = make_stream("layer.weight", placeholder, grid, quantizer, storage, account, sources)
    return Streamed(stream, placeholder, account, sources)


def make_parameter(values: torch.Tensor) -> torch.nn.Parameter:
    """What all builders make their placeholder with."""
    return torch.nn.Parameter(values, requires_grad=False)


def make_stream(*arguments: Any) -> ParameterStream:
    """What all builders make their stream with."""
    return CheckpointStream(*arguments)


def make_sources() -> CheckpointSources:
    """What all builders tell tensors' names by."""
    return CheckpointSources()


def one_scale() -> UnitQuantizer:
    """What quantizes a unit of one scale."""
    return WholeUnitQuantizer(quantize_unit)


def one_scale_a_row(rows: int) -> UnitQuantizer:
    """What quantizes each of a weight's rows."""
    return RowQuantizer(quantize_rows)
