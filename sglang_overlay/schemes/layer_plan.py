# SPDX-License-Identifier: Apache-2.0
"""How one layer goes through a load, and what weight updates ask of it. A scheme (``scheme.py``) makes one a layer."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sglang_overlay.core.errors import UnexpectedParametersError
from sglang_overlay.core.placeholders import PlaceholderAllocation
from sglang_overlay.core.quantizers import UnitQuantizer
from sglang_overlay.core.stream import Storage
from sglang_overlay.core.units import UnitGrid


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


def quantize_whole(plan: ParameterPlan, values: torch.Tensor) -> torch.Tensor:
    """Quantize a parameter that is there in full, in high precision; returns each unit's largest magnitude."""
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
    """One layer's way through a load, in the order of the methods, and what updates need of it then.

    Neither knows anything else of its scheme.

    Attributes:
        weights: names of the parameters that the checkpoint's high-precision weights are loaded into.
        fills: names of further parameters (scales, say) that only quantizing writes.
        replaces_stock: the layer becomes something that upstream does not make of a high-precision weight, so one that
            cannot be streamed is quantized here as well, when it has been loaded whole.
    """

    weights: frozenset[str]
    fills: frozenset[str] = frozenset()
    replaces_stock: ClassVar[bool] = False

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

    @abc.abstractmethod
    def registered(
        self, layer: torch.nn.Module, placeholders: Mapping[str, torch.nn.Parameter]
    ) -> dict[str, Storage] | None:
        """The memory of a finished layer's weights, by name; None where they have been repacked since."""

    def scale_placeholders(
        self, layer: torch.nn.Module, placeholders: Mapping[str, torch.nn.Parameter]
    ) -> dict[str, tuple[str, torch.nn.Parameter]]:
        """Where updates may bring weights that are quantized already, in the layout in which the layer is served.

        To be called when upstream has just created the layer.

        Returns:
            For each such weight the name under which upstream's models look for the parameter of its scales, and a
            placeholder for that, without memory, with upstream's loader; its elements are in the order of the
            storage's.
        """
        return {}


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
