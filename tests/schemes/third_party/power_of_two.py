# SPDX-License-Identifier: Apache-2.0
"""A scheme of another package, that docs/adding.md points to: 128 x 128 blocks whose scales are powers of two."""

from __future__ import annotations

import torch

from sglang_overlay.schemes.block import BlockPlan, BlockQuantizer, BlockScheme


class PowerOfTwoQuantizer(BlockQuantizer):
    """As block-wise, with each scale rounded up to a power of two: UE8M0 checkpoints have such scales."""

    def scale_of(self, absmax: torch.Tensor) -> torch.Tensor:
        return torch.exp2(torch.ceil(torch.log2(super().scale_of(absmax))))


class PowerOfTwoPlan(BlockPlan):
    def quantizer(self):
        return PowerOfTwoQuantizer()


class PowerOfTwoScheme(BlockScheme):
    summary = "fp8, one scale a block of 128 x 128, a power of two"

    def plan(self, kind, method):
        return PowerOfTwoPlan(kind)


POWER_OF_TWO = PowerOfTwoScheme()
