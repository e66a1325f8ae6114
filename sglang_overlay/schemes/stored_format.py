# SPDX-License-Identifier: Apache-2.0
"""How a scheme's weights are stored in a checkpoint that stock SGLang loads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_overlay.core.quantizers import UnitQuantizer


@dataclass(frozen=True, kw_only=True)
class StoredFormat:
    """A quantized matrix ``[N, K]`` becomes values of the same shape under its own name, and scales beside it.

    Attributes:
        config: ``quantization_config`` of config.json, without the list of modules that are not quantized.
        ignored: the config's key for that list.
        scale: suffix that turns the matrix's name into that of its scales, for example ``_scale_inv``.
        scale_shape: maps a matrix's shape to that of its scales; raises ``ValueError`` for a size not supported.
        quantizer: turns rows into values and scales, on the CPU.
        rows: number of rows that share scales. A matrix is quantized in runs of a multiple of it, from its first row.
        same_as: which online loads have the same weights as the checkpoint.
        dtype: dtype of the values, as of the parameters that stock creates for ``config``. Scales are float32.
    """

    config: Mapping[str, Any]
    ignored: str
    scale: str
    scale_shape: Callable[[Sequence[int]], tuple[int, ...]]
    quantizer: UnitQuantizer
    rows: int
    same_as: str
    dtype: torch.dtype = torch.float8_e4m3fn

    def quantize(self, rows: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> None:
        """Quantize consecutive rows of a matrix: a multiple of ``self.rows``, except at its end.

        Args:
            rows: ``[R, K]`` in high precision.
            values: output, ``[R, K]`` of ``self.dtype``.
            scales: output, float32 with shape ``scale_shape((R, K))``.
        """
        self.quantizer.quantize_run(rows.unsqueeze(0), values.unsqueeze(0), scales.view(1, -1))
