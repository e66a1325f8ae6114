# SPDX-License-Identifier: Apache-2.0
"""A plan for layers that upstream creates as for a checkpoint that is quantized already."""

from __future__ import annotations

import abc
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sglang_overlay.core.placeholders import twin
from sglang_overlay.core.quantizers import UnitQuantizer
from sglang_overlay.core.stream import Storage
from sglang_overlay.core.units import UnitGrid
from sglang_overlay.schemes import capabilities
from sglang_overlay.schemes.layer_plan import LayerPlan, ParameterPlan, Placeholders


class SerializedPlan(LayerPlan):
    """A layer as upstream creates it for an already quantized checkpoint: values and scales in real memory.

    These are the final storage. While the checkpoint is read, placeholders replace the values; then upstream's own
    post-processing finishes the layer, as if the values had come from a file.

    Args:
        scales: for each weight, the name of its scale parameter.
    """

    replaces_stock = True

    def __init__(self, scales: Mapping[str, str]) -> None:
        self.weights = frozenset(scales)
        self.fills = frozenset(scales.values())
        self._scales = dict(scales)
        self._real: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}
        self._forms: dict[str, Any] = {}
        self._likes: dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]] = {}

    @abc.abstractmethod
    def grid(self, layer: torch.nn.Module, name: str, weight: torch.Tensor) -> UnitGrid:
        """How a parameter divides into units. On a device they should be large, since each operation is a launch.

        A unit holds all values of each of its scales, and every unit has equally many scales. It should hold no rows of
        two parts of a fused layer: such a unit waits for both, and an update has to bring both.

        Args:
            layer: after upstream's ``create_weights``: ``logical_widths`` and the like can be read.
            name: the parameter's.
            weight: the real one, ``[N, K]`` or ``[E, N, K]``, of the served dtype.

        Raises:
            ValueError: the scheme does not support this size.
        """

    @abc.abstractmethod
    def quantizer(self) -> UnitQuantizer:
        """Turns units into values and scales; the scales of ``n`` units are ``[n, S]``, in row-major order."""

    def create(self, create: Callable[[], None], layer: torch.nn.Module, dtype: torch.dtype) -> Placeholders:
        create()
        self._real = {name: self._pair(layer, name) for name in self.weights}
        self._forms = {name: self._form(*pair) for name, pair in self._real.items()}
        self._likes = {
            name: (
                twin(weight, torch.empty_like(weight, device="meta")),
                twin(scale, torch.empty_like(scale, device="meta")),
            )
            for name, (weight, scale) in self._real.items()
        }
        self._grids = {name: self.grid(layer, name, weight) for name, (weight, _) in self._real.items()}
        made = {
            name: twin(weight, torch.empty(weight.shape, dtype=dtype, device="meta"))
            for name, (weight, _) in self._real.items()
        }
        layer._parameters.update(made)
        return Placeholders(made, next(iter(self._real.values()))[0].device)

    def allocate(self, name: str, placeholder: torch.Tensor, device: torch.device) -> Storage:
        if name in self._real:
            return self._storage(name, *self._real[name])
        weight, scale = (torch.empty_like(like, device=device) for like in self._likes[name])
        return self._storage(name, weight, scale)

    def parameter(self, name: str, placeholder: torch.Tensor, storage: Storage) -> ParameterPlan:
        return ParameterPlan(self._grids[name], self.quantizer(), storage)

    def register(self, layer: torch.nn.Module, storages: Mapping[str, Storage]) -> None:
        for name, storage in storages.items():
            weight, scale = self._real.get(name) or self._parameters(name, storage)
            layer._parameters.update({name: weight, self._scales[name]: scale})
        self._real = {}

    def again(self) -> LayerPlan:
        plan = copy.copy(self)
        plan._real = {}
        return plan

    def process(self, original: Callable[[], None], method: Any, layer: torch.nn.Module) -> None:
        original()

    def registered(
        self, layer: torch.nn.Module, placeholders: Mapping[str, torch.nn.Parameter]
    ) -> dict[str, Storage] | None:
        pairs = {name: self._pair(layer, name) for name in placeholders}
        # aiter's shuffle changes neither dtype nor shape, so _form cannot see it.
        if capabilities.uses_aiter() or any(self._form(*pair) != self._forms[name] for name, pair in pairs.items()):
            return None
        return {name: self._storage(name, *pair) for name, pair in pairs.items()}

    def scale_placeholders(
        self, layer: torch.nn.Module, placeholders: Mapping[str, torch.nn.Parameter]
    ) -> dict[str, tuple[str, torch.nn.Parameter]]:
        scales = {name: layer.get_parameter(scale) for name, scale in self._scales.items()}
        return {
            name: (self._scales[name], twin(scale, torch.empty_like(scale, device="meta")))
            for name, scale in scales.items()
            if hasattr(scale, "weight_loader")
        }

    def _pair(self, layer: torch.nn.Module, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        return layer.get_parameter(name), layer.get_parameter(self._scales[name])

    def _parameters(self, name: str, storage: Storage) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
        """Parameters over ``storage``, as upstream has created them."""
        weight, scale = self._likes[name]
        return twin(weight, storage.weight.view(weight.shape)), twin(scale, storage.scale.view(scale.shape))

    def _storage(self, name: str, weight: torch.Tensor, scale: torch.Tensor) -> Storage:
        grid = self._grids[name]
        return Storage(weight.data.view(grid.count, *grid.shape), scale.data.view(grid.count, -1))

    @staticmethod
    def _form(weight: torch.Tensor, scale: torch.Tensor) -> tuple[Any, ...]:
        """Changes if upstream repacks the layer; DeepGEMM's scales, rounded to powers of two, have a flag for that."""
        return (
            *(form for tensor in (weight, scale) for form in (tensor.dtype, tensor.shape, tensor.is_contiguous())),
            bool(getattr(scale, "format_ue8m0", False)),
        )
