# SPDX-License-Identifier: Apache-2.0
"""What a kind of layer knows about being quantized while it is loaded: the interface between loader and scheme."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from sglang_overlay.core.placeholders import PlaceholderAllocation, twin
from sglang_overlay.core.quantizers import UnitQuantizer
from sglang_overlay.core.stream import Storage
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.errors import UnexpectedParametersError


@dataclass(frozen=True)
class ParameterPlan:
    """How one parameter is quantized and where the result goes."""

    grid: UnitGrid
    quantizer: UnitQuantizer
    storage: Storage

    def quantize_whole(self, values: torch.Tensor) -> torch.Tensor:
        """Quantize a parameter that is there in full, in high precision; returns each unit's largest magnitude."""
        units = values.reshape(self.grid.count, *self.grid.shape)
        return self.quantizer.quantize_run(units, self.storage.weight, self.storage.scale)


@dataclass(frozen=True)
class Placeholders:
    """Parameters without memory that stand for a layer's high-precision weights, and where those would lie."""

    parameters: dict[str, torch.nn.Parameter]
    device: torch.device


class LayerPlan(abc.ABC):
    """One layer's way through a load, in the order of the methods. The loader knows nothing else of its scheme.

    Attributes:
        weights: names of the parameters that the checkpoint's high-precision weights are loaded into.
        fills: names of further parameters that quantizing fills, and nothing else.
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
        """Final memory of one of ``weights``."""

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


class SerializedPlan(LayerPlan):
    """A layer as upstream creates it for a checkpoint that is quantized already: values and scales, in real memory.

    They are the final storage. While the checkpoint is read, placeholders stand in the values' places; then upstream's
    own post-processing finishes the layer, as if the values had come from a file.

    Args:
        scales: for each weight the name of the parameter that takes its scales.
    """

    replaces_stock = True

    def __init__(self, scales: Mapping[str, str]) -> None:
        self.weights = frozenset(scales)
        self.fills = frozenset(scales.values())
        self._scales = dict(scales)
        self._real: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}
        self._forms: dict[str, Any] = {}

    @abc.abstractmethod
    def grid(self, layer: torch.nn.Module, shape: tuple[int, ...]) -> UnitGrid:
        """How a weight of ``shape`` divides into units."""

    @abc.abstractmethod
    def quantizer(self, device: torch.device) -> UnitQuantizer:
        """What turns units into values and scales; it is given all scales of a unit in one dimension."""

    def create(self, create: Callable[[], None], layer: torch.nn.Module, dtype: torch.dtype) -> Placeholders:
        create()
        self._real = {name: self._pair(layer, name) for name in self.weights}
        self._forms = {name: self._form(*pair) for name, pair in self._real.items()}
        self._grids = {name: self.grid(layer, tuple(weight.shape)) for name, (weight, _) in self._real.items()}
        made = {
            name: twin(weight, torch.empty(weight.shape, dtype=dtype, device="meta"))
            for name, (weight, _) in self._real.items()
        }
        layer._parameters.update(made)
        return Placeholders(made, next(iter(self._real.values()))[0].device)

    def allocate(self, name: str, placeholder: torch.Tensor, device: torch.device) -> Storage:
        return self._storage(name, *self._real[name])

    def parameter(self, name: str, placeholder: torch.Tensor, storage: Storage) -> ParameterPlan:
        return ParameterPlan(self._grids[name], self.quantizer(storage.weight.device), storage)

    def register(self, layer: torch.nn.Module, storages: Mapping[str, Storage]) -> None:
        layer._parameters.update({name: weight for name, (weight, _) in self._real.items()})
        self._real.clear()

    def process(self, original: Callable[[], None], method: Any, layer: torch.nn.Module) -> None:
        original()

    def registered(
        self, layer: torch.nn.Module, placeholders: Mapping[str, torch.nn.Parameter]
    ) -> dict[str, Storage] | None:
        pairs = {name: self._pair(layer, name) for name in placeholders}
        if any(self._form(*pair) != self._forms[name] for name, pair in pairs.items()):
            return None
        return {name: self._storage(name, *pair) for name, pair in pairs.items()}

    def _pair(self, layer: torch.nn.Module, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        return layer.get_parameter(name), layer.get_parameter(self._scales[name])

    def _storage(self, name: str, weight: torch.Tensor, scale: torch.Tensor) -> Storage:
        grid = self._grids[name]
        return Storage(weight.data.view(grid.count, *grid.shape), scale.data.view(grid.count, -1))

    @staticmethod
    def _form(weight: torch.Tensor, scale: torch.Tensor) -> tuple[Any, ...]:
        """What upstream changes where it repacks: DeepGEMM's scales are rounded to powers of two, and say so."""
        return (
            *(form for tensor in (weight, scale) for form in (tensor.dtype, tensor.shape, tensor.is_contiguous())),
            bool(getattr(scale, "format_ue8m0", False)),
        )
