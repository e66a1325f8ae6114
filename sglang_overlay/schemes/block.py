# SPDX-License-Identifier: Apache-2.0
"""``block``: one scale for each 128 x 128 block, as DeepSeek-V3's fp8 checkpoints have (arXiv 2412.19437, 3.3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from sglang.srt.layers.quantization import fp8

from sglang_overlay.core.quantizers import AssembledUnits, UnitQuantizer, is_rounding_of
from sglang_overlay.core.regions import slices
from sglang_overlay.core.staging import Piece
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.schemes.arithmetic import CHUNK_ELEMENTS
from sglang_overlay.schemes.expert_rows import grid_of_rows, projection_rows
from sglang_overlay.schemes.scheme import LayerKind
from sglang_overlay.schemes.serialized_plan import SerializedPlan
from sglang_overlay.schemes.stored_format import StoredFormat

BLOCK_SIZE = 128
COLUMNS = CHUNK_ELEMENTS // BLOCK_SIZE
"""Columns of a row of blocks that are quantized at once on the CPU; a multiple of 128."""
SMALLEST_ABSMAX = 1e-12
"""The magnitude that a block of zeros counts as."""


class BlockScheme:
    """The same as after loading a block-wise fp8 checkpoint (DeepSeek-V3's, arXiv 2412.19437, section 3.3.2).

    Activations get one scale per token and 128 columns.
    """

    summary = "fp8, one scale a block of 128 x 128, as DeepSeek-V3's own checkpoints"

    def why_not(self, kind: LayerKind) -> str | None:
        return None

    def method(self, kind: LayerKind, layer: torch.nn.Module, name: str) -> Any:
        config = fp8.Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[BLOCK_SIZE, BLOCK_SIZE])
        return fp8.Fp8LinearMethod(config) if kind is LayerKind.LINEAR else fp8.Fp8MoEMethod(config)

    def plan(self, kind: LayerKind, method: Any) -> BlockPlan:
        return BlockPlan(kind)

    def stored(self) -> StoredFormat | None:
        """As in DeepSeek-V3's fp8 checkpoint: vLLM's ``Fp8Config``, transformers' ``FineGrainedFP8Config``."""
        quantizer = self.plan(LayerKind.LINEAR, None).quantizer()
        return StoredFormat(
            config=STORED,
            ignored="modules_to_not_convert",
            scale="_scale_inv",
            scale_shape=_blocks,
            quantizer=quantizer,
            rows=BLOCK_SIZE,
            same_as=SAME_AS,
        )


SAME_AS = "at any tensor parallel size: no block is split over ranks"
STORED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE],
}
"""The ``quantization_config`` of such a checkpoint."""


def _blocks(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK_SIZE) for size in shape)


def _split(tensors: Sequence[torch.Tensor], size: int, axis: int) -> list[tuple[torch.Tensor, ...]]:
    """Split values, results and scales ``[n, down, across]`` into matching parts of ``size`` values along ``axis``."""
    values, out, scale = tensors
    return [values.split(size, axis), out.split(size, axis), scale.split(size // BLOCK_SIZE, axis)]


class BlockPlan(SerializedPlan):
    """Units are rows of blocks, or a whole matrix if its height or that of a fused part is not a multiple of 128.

    On a device, an expert's units are its projections.
    """

    def __init__(self, kind: LayerKind) -> None:
        self._kind = kind
        names = ["weight"] if kind is LayerKind.LINEAR else ["w13_weight", "w2_weight"]
        super().__init__({name: f"{name}_scale_inv" for name in names})

    def grid(self, layer: torch.nn.Module, name: str, weight: torch.Tensor) -> UnitGrid:
        shape, is_linear = tuple(weight.shape), self._kind is LayerKind.LINEAR
        rows = shape[-2] if is_linear else projection_rows(layer, name, shape[-2])
        if any(part % BLOCK_SIZE for part in (*getattr(layer, "logical_widths", ()), rows)):
            return UnitGrid.one(shape) if is_linear else UnitGrid.per_slice(shape)
        return grid_of_rows(shape, BLOCK_SIZE if is_linear or weight.is_cpu else rows)

    def quantizer(self) -> UnitQuantizer:
        return BlockQuantizer()


class BlockQuantizer(AssembledUnits):
    """A block's scale is its largest magnitude over the largest fp8 value, in float32. Blocks at edges are smaller."""

    # Quotients are float32.
    at_once: ClassVar[int] = AssembledUnits.at_once // 4

    def scale_of(self, absmax: torch.Tensor) -> torch.Tensor:
        """Scales of blocks with these largest magnitudes, float32 with the same shape."""
        # e4m3fn on every platform, as in a block-wise checkpoint: upstream converts that to e4m3fnuz itself.
        return absmax.clamp(min=SMALLEST_ABSMAX) / torch.finfo(torch.float8_e4m3fn).max

    def quantize_units(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        blocks = scale.view(len(values), *_blocks(values.shape[1:]))
        if not values.is_cpu:
            return self._quantize_blocks(values, weight, blocks)
        # In parts, so that intermediates stay in cache.
        found = torch.zeros(len(values), dtype=torch.float32)
        for rows in zip(*_split((values, weight, blocks), BLOCK_SIZE, 1), strict=True):
            for part in zip(*_split(rows, COLUMNS, 2), strict=True):
                torch.maximum(found, self._quantize_blocks(*part), out=found)
        return found

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        rows, columns = weight.shape
        blocks = scale.view(-(-rows // BLOCK_SIZE), -1)
        factors = blocks.repeat_interleave(BLOCK_SIZE, 0).repeat_interleave(BLOCK_SIZE, 1)[:rows, :columns]
        return is_rounding_of(weight[slices(piece.box)], factors[slices(piece.box)], piece.values)

    def _quantize_blocks(self, values: torch.Tensor, out: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Quantize matrices ``[n, rows, columns]`` with ``scale`` ``[n, blocks down, blocks across]``."""
        units, rows, columns = values.shape
        _, down, across = scale.shape
        padding = (0, across * BLOCK_SIZE - columns, 0, down * BLOCK_SIZE - rows)
        padded = torch.nn.functional.pad(values, padding) if any(padding) else values
        # Views the values without casting them to float32: a quotient by float32 is float32 anyway.
        blocks = padded.reshape(units, down, BLOCK_SIZE, across, BLOCK_SIZE)
        largest: torch.Tensor = torch.linalg.vector_norm(blocks, torch.inf, dim=(2, 4), dtype=torch.float32)
        scale.copy_(self.scale_of(largest))
        # A quotient exceeds 448 at most by float32 rounding, which rounding to fp8 removes again.
        quotients = blocks / scale.view(units, down, 1, across, 1)
        out.copy_(quotients.view(padded.shape)[:, :rows, :columns])
        found: torch.Tensor = largest.flatten(1).amax(1)
        return found


BLOCK = BlockScheme()
