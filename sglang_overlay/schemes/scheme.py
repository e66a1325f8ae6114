# SPDX-License-Identifier: Apache-2.0
"""The interface of a quantization scheme."""

from __future__ import annotations

import enum
from typing import Any, Protocol

import torch

from sglang_overlay.schemes.layer_plan import LayerPlan
from sglang_overlay.schemes.stored_format import StoredFormat


class LayerKind(enum.Enum):
    """Kinds of layers that can have different schemes; the value is the key in ``SGLANG_STREAMFP8_SCHEME``."""

    LINEAR = "linear"
    EXPERTS = "moe"


class Scheme(Protocol):
    """How layers are quantized while they are loaded, and served afterwards.

    Attributes:
        summary: what it is, in one line, for readers of the code: nothing prints it.
    """

    summary: str

    def why_not(self, kind: LayerKind) -> str | None:
        """Why layers of this kind cannot have the scheme on this platform; None if they can."""

    def method(self, kind: LayerKind, layer: torch.nn.Module, name: str) -> Any:
        """The quantization method that serves a layer, SGLang's or the scheme's own.

        A ``Fp8LinearMethod`` or ``Fp8MoEMethod`` needs a config that ``eligibility.is_online_fp8`` refuses: serialized
        (as ``block``) or a subclass (``ChosenFp8Config``). Otherwise the hooks for stock's scheme plan the layer too.

        Args:
            kind: of the layer.
            layer: as SGLang's ``QuantizationConfig.get_quant_method`` gets it, without parameters yet.
            name: its full name in the model.

        Returns:
            A new object for this layer, since the load modifies it. Its ``create_weights`` has a parameter
            ``params_dtype``. SGLang's linear layers choose their weight loader by the name of the method's class
            (``WEIGHT_LOADER_V2_SUPPORTED``), so a subclass of ``Fp8LinearMethod`` has to be called so as well.
        """

    def plan(self, kind: LayerKind, method: Any) -> LayerPlan:
        """How a layer is loaded: a new plan for each layer.

        Args:
            kind: of the layer.
            method: the result of ``method`` for it; None where only the plan's ``quantizer()`` is wanted, without a
                layer (``sglang_overlay.quantize``).
        """

    def stored(self) -> StoredFormat | None:
        """How its weights are stored in a checkpoint that stock SGLang serves: ``export`` and ``quantize`` write that.

        None if stock creates no such parameters for a checkpoint, has no kernel for them, or quantizes the values again
        when it loads them (``tensor``).
        """
