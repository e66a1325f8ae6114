# SPDX-License-Identifier: Apache-2.0
"""How a layer goes through a load, and what updates ask of it. A scheme (``scheme.py``) makes a plan for each layer."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sglang_overlay.core.allocation import PlaceholderAllocation
from sglang_overlay.core.load_errors import UnexpectedParametersError
from sglang_overlay.core.quantizers import UnitQuantizer
from sglang_overlay.core.stream import Storage
from sglang_overlay.core.units import UnitGrid


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter is quantized and where the result goes.

    Attributes:
        grid: how the parameter divides into units.
        quantizer: turns a unit into fp8 values and scales.
        storage: the memory it writes to.
    """

    grid: UnitGrid
    quantizer: UnitQuantizer
    storage: Storage


def quantize_whole(plan: ParameterPlan, values: torch.Tensor) -> torch.Tensor:
    """Quantize a complete high-precision parameter; returns each unit's largest magnitude, ``[units]``."""
    units = values.reshape(plan.grid.count, *plan.grid.shape)
    return plan.quantizer.quantize_run(units, plan.storage.weight, plan.storage.scale)


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
    """One layer's steps through a load, in the order of the methods, and what weight updates ask of it then.

    Loads and updates know nothing else of its scheme.

    Attributes:
        weights: names of the parameters that high-precision checkpoint weights are loaded into.
        fills: names of further parameters, such as scales, that only quantizing writes.
        replaces_stock: whether upstream cannot quantize the layer this way from a high-precision weight. Then the load
            also quantizes layers that cannot be streamed, after they have been loaded completely.
    """

    weights: frozenset[str]
    fills: frozenset[str] = frozenset()
    replaces_stock: ClassVar[bool] = False

    @abc.abstractmethod
    def create(self, create: Callable[[], None], layer: torch.nn.Module, dtype: torch.dtype) -> Placeholders:
        """Run upstream's ``create_weights`` so that each of ``weights`` is a placeholder of ``dtype``.

        Raises:
            UnexpectedParametersError: upstream created other parameters; ``layer`` has to be created as in stock.
        """

    @abc.abstractmethod
    def allocate(self, name: str, placeholder: torch.Tensor, device: torch.device) -> Storage:
        """Allocate the final memory of one of ``weights``, on ``device``.

        Args:
            name: of the parameter.
            placeholder: has the shape and the high-precision dtype of the weight.
            device: of the layer.
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

    def again(self) -> LayerPlan:
        """A plan to ``allocate``, ``register`` and ``process`` a copy of the finished layer, in memory of its own.

        Weight updates quantize into such a copy where they cannot write into what upstream has made of the layer.
        """
        return copy.copy(self)

    @abc.abstractmethod
    def registered(
        self, layer: torch.nn.Module, placeholders: Mapping[str, torch.nn.Parameter]
    ) -> dict[str, Storage] | None:
        """The memory of a finished layer's weights, by name; None if upstream has repacked them."""

    def scale_placeholders(
        self, layer: torch.nn.Module, placeholders: Mapping[str, torch.nn.Parameter]
    ) -> dict[str, tuple[str, torch.nn.Parameter]]:
        """Placeholders for the scales of weights that updates may bring already quantized, in the served layout.

        To be called when upstream has just created the layer.

        Returns:
            For each such weight, the name by which upstream's models look up its scale parameter, and a placeholder for
            that parameter, without memory, with upstream's loader, and with elements in the order of the storage's.
        """
        return {}


class OnlinePlan(LayerPlan):
    """A layer whose weights upstream creates in high precision, and in stock quantizes after loading."""

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
