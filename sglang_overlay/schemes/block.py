# SPDX-License-Identifier: Apache-2.0
"""``block``: one scale for each 128 x 128 block, as DeepSeek-V3's fp8 checkpoints have (arXiv 2412.19437, 3.3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.layers.quantization import fp8

from sglang_overlay.core.cpu_quantizers import CHUNK_ELEMENTS
from sglang_overlay.core.quantizers import AssembledUnits, UnitQuantizer, is_rounding_of
from sglang_overlay.core.regions import slices
from sglang_overlay.core.staging import Piece
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.schemes.expert_rows import grid_of_rows
from sglang_overlay.schemes.scheme import LayerKind
from sglang_overlay.schemes.stored import StoredForm
from sglang_overlay.upstream.updatable_plan import SerializedPlan

BLOCK_SIZE = 128
COLUMNS = CHUNK_ELEMENTS // BLOCK_SIZE
"""Of a strip of blocks, quantized at once on the CPU: a multiple of 128."""
SMALLEST_ABSMAX = 1e-12
"""A block of zeros gets the scale of this."""


class BlockScheme:
    """What SGLang has after loading a block-wise fp8 checkpoint (DeepSeek-V3's, arXiv 2412.19437, section 3.3.2).

    Activations get one scale a token and 128 columns.
    """

    summary = "fp8, one scale a block of 128 x 128, as DeepSeek-V3's own checkpoints"

    def why_not(self, kind: LayerKind) -> str | None:
        return None

    def method(self, kind: LayerKind, layer: torch.nn.Module, name: str) -> Any:
        config = fp8.Fp8Config(is_checkpoint_fp8_serialized=True, weight_block_size=[BLOCK_SIZE, BLOCK_SIZE])
        return fp8.Fp8LinearMethod(config) if kind is LayerKind.LINEAR else fp8.Fp8MoEMethod(config)

    def plan(self, kind: LayerKind, method: Any) -> BlockPlan:
        return BlockPlan(kind)

    def stored(self) -> StoredForm | None:
        """As DeepSeek-V3's fp8 checkpoint: ``Fp8Config`` of vLLM, ``FineGrainedFP8Config`` of transformers."""
        quantizer = self.plan(LayerKind.LINEAR, None).quantizer(torch.device("cpu"))
        return StoredForm(STORED, "modules_to_not_convert", "_scale_inv", _blocks, quantizer, BLOCK_SIZE, SAME_AS)


SAME_AS = "at any tensor parallel size: no block is split over ranks"
STORED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK_SIZE, BLOCK_SIZE],
}
"""What ``quantization_config`` of such a checkpoint says."""


def _blocks(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK_SIZE) for size in shape)


class BlockPlan(SerializedPlan):
    """Units are rows of blocks, or a whole matrix where its height or a part fused into it is no multiple of 128."""

    def __init__(self, kind: LayerKind) -> None:
        names = ["weight"] if kind is LayerKind.LINEAR else ["w13_weight", "w2_weight"]
        super().__init__({name: f"{name}_scale_inv" for name in names})

    def grid(self, layer: torch.nn.Module, shape: tuple[int, ...]) -> UnitGrid:
        parts = [*getattr(layer, "logical_widths", ()), shape[-2]]
        if not any(part % BLOCK_SIZE for part in parts):
            return grid_of_rows(shape, BLOCK_SIZE)
        return UnitGrid.one(shape) if len(shape) == 2 else UnitGrid.per_slice(shape)

    def quantizer(self, device: torch.device) -> UnitQuantizer:
        return BlockQuantizer()


class BlockQuantizer(AssembledUnits):
    """Scale of a block: its largest magnitude over the largest fp8 value, in float32. Blocks at edges are smaller."""

    def scale_of(self, absmax: torch.Tensor) -> torch.Tensor:
        """Scales of blocks with these largest magnitudes, float32 of the same shape."""
        return absmax.clamp(min=SMALLEST_ABSMAX) / torch.finfo(fp8.fp8_dtype).max

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        magnitudes = []
        for unit, out, factors in zip(values, weight, scale, strict=True):
            blocks = factors.view(-(-unit.shape[0] // BLOCK_SIZE), -1)
            strips = zip(unit.split(BLOCK_SIZE), out.split(BLOCK_SIZE), blocks, strict=True)
            magnitudes.append(torch.stack([self._quantize_strip(*strip) for strip in strips]).amax())
        return torch.stack(magnitudes)

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        rows, columns = weight.shape
        blocks = scale.view(-(-rows // BLOCK_SIZE), -1)
        factors = blocks.repeat_interleave(BLOCK_SIZE, 0).repeat_interleave(BLOCK_SIZE, 1)[:rows, :columns]
        return is_rounding_of(weight[slices(piece.box)], factors[slices(piece.box)], piece.values)

    def _quantize_strip(self, strip: torch.Tensor, out: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Quantize one row of blocks, ``[at most 128, columns]``, with ``scale`` of one element a block."""
        if strip.device.type != "cpu":
            return self._quantize_blocks(strip, out, scale)
        # So that what is between stays in cache.
        parts = (strip.split(COLUMNS, 1), out.split(COLUMNS, 1), scale.split(COLUMNS // BLOCK_SIZE))
        return torch.stack([self._quantize_blocks(*part) for part in zip(*parts, strict=True)]).amax()

    def _quantize_blocks(self, strip: torch.Tensor, out: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        rows, columns = strip.shape
        wide = torch.nn.functional.pad(strip.float(), (0, -columns % BLOCK_SIZE)).view(rows, -1, BLOCK_SIZE)
        largest = wide.abs().amax(dim=(0, 2))
        scale.copy_(self.scale_of(largest))
        limit = torch.finfo(out.dtype).max
        products = (wide / scale.view(1, -1, 1)).clamp_(-limit, limit)
        out.copy_(products.view(rows, -1)[:, :columns])
        return largest.amax()


BLOCK = BlockScheme()
