# SPDX-License-Identifier: Apache-2.0
"""How one layer goes through a load: what the loader asks of it. A scheme (``scheme.py``) makes one for each layer."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers.quantization.streaming_fp8.errors import UnexpectedParametersError
from sglang.srt.layers.quantization.streaming_fp8.placeholders import PlaceholderAllocation
from sglang.srt.layers.quantization.streaming_fp8.quantizers import UnitQuantizer
from sglang.srt.layers.quantization.streaming_fp8.stream import Storage
from sglang.srt.layers.quantization.streaming_fp8.units import UnitGrid


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter is quantized and where the result goes.

    Attributes:
        grid: how it divides into units.
        quantizer: what makes fp8 values and scales of a unit.
        storage: what it writes.
    """

    grid: UnitGrid
    quantizer: UnitQuantizer
    storage: Storage


@dataclass(frozen=True)
class Placeholders:
    """Parameters without memory that stand for a layer's high-precision weights.

    Attributes:
        parameters: by name, on the meta device, with the shapes, dtypes and weight loaders that upstream gave them.
        device: where upstream would have allocated them.
    """

    parameters: dict[str, torch.nn.Parameter]
    device: torch.device


class LayerPlan(abc.ABC):
    """One layer's way through a load, in the order of the methods. The loader knows nothing else of its scheme.

    Attributes:
        weights: names of the parameters that the checkpoint's high-precision weights are loaded into.
    """

    weights: frozenset[str]

    @abc.abstractmethod
    def create(self, create: Callable[[], None], layer: torch.nn.Module, dtype: torch.dtype) -> Placeholders:
        """Run upstream's ``create_weights`` so that each of ``weights`` is a placeholder of ``dtype``.

        Raises:
            UnexpectedParametersError: upstream has created something else; ``layer`` is to be created as in stock.
        """

    @abc.abstractmethod
    def allocate(self, name: str, placeholder: torch.Tensor, device: torch.device) -> Storage:
        """Final memory of one of ``weights``, on ``device``.

        Args:
            name: the parameter's.
            placeholder: shape and high-precision dtype of what the checkpoint brings.
            device: where the layer lies.
        """

    @abc.abstractmethod
    def parameter(self, name: str, placeholder: torch.Tensor, storage: Storage) -> ParameterPlan:
        """How one of ``weights`` divides into units and is quantized into ``storage``."""

    @abc.abstractmethod
    def register(self, layer: torch.nn.Module, storages: Mapping[str, Storage]) -> None:
        """Put the quantized parameters on the layer, in place of the placeholders."""

    @abc.abstractmethod
    def process(self, original: Callable[[], None], method: Any, layer: torch.nn.Module) -> None:
        """Finish the registered layer for its kernel.

        Args:
            original: upstream's ``process_weights_after_loading`` of the layer.
            method: its quantization method.
            layer: the layer.
        """


class OnlinePlan(LayerPlan):
    """A layer whose weights upstream creates in high precision, to quantize them after loading."""

    def create(self, create: Callable[[], None], layer: torch.nn.Module, dtype: torch.dtype) -> Placeholders:
        allocation = PlaceholderAllocation(dtype)
        with allocation:
            create()
        made = {name: value for name, value in layer._parameters.items() if value is not None and value.is_meta}
        if set(made) != self.weights or allocation.device is None:
            raise UnexpectedParametersError(
                f"upstream created {sorted(made)} where {sorted(self.weights)} were expected"
            )
        return Placeholders(made, allocation.device)
