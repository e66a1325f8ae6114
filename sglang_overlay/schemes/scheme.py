# SPDX-License-Identifier: Apache-2.0
"""What a quantization scheme is."""

from __future__ import annotations

import enum
from typing import Any, Protocol

import torch

from sglang_overlay.schemes.layer_plan import LayerPlan
from sglang_overlay.schemes.stored_format import StoredFormat


class LayerKind(enum.Enum):
    """Kinds of layers that have a scheme of their own; the value is the key in ``SGLANG_STREAMFP8_SCHEME``."""

    LINEAR = "linear"
    EXPERTS = "moe"


class Scheme(Protocol):
    """How layers are quantized while they are loaded, and served afterwards.

    Attributes:
        summary: one line for messages and documentation.
    """

    summary: str

    def why_not(self, kind: LayerKind) -> str | None:
        """Why layers of this kind cannot have the scheme on this platform; None where they can."""

    def method(self, kind: LayerKind, layer: torch.nn.Module, name: str) -> Any:
        """SGLang's quantization method that serves a layer.

        Args:
            kind: of the layer.
            layer: as SGLang's ``QuantizationConfig.get_quant_method`` gets it, without parameters yet.
            name: its full name in the model.

        Returns:
            An object of this layer's own: it is changed for the load. Its ``create_weights`` has a parameter
            ``params_dtype``.
        """

    def plan(self, kind: LayerKind, method: Any) -> LayerPlan:
        """How a layer is loaded: a plan of its own for each layer.

        Args:
            kind: of the layer.
            method: what ``method`` returned for it.
        """

    def stored(self) -> StoredFormat | None:
        """How its weights are stored in a checkpoint that stock SGLang loads; None where stock has no such format."""
