# SPDX-License-Identifier: Apache-2.0
"""What a load keeps of a layer, so that the layer's weights can be updated later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from sglang_overlay.core.placeholders import set_loader, twin

if TYPE_CHECKING:
    from sglang_overlay.core.layer import WeightLoader
    from sglang_overlay.schemes.layer_plan import LayerPlan


class UpdatableLayer:
    """What is kept of a layer's first load.

    Attributes:
        name: the layer's qualified name.
        module: the layer.
        plan: how it is quantized.
        placeholders: what upstream's loaders write weights to, by parameter name; without memory.
        scales: for each weight that may come quantized already, the name of its scales and a placeholder for them.
        reads_whole: upstream needs the weights in high precision, or they could not be streamed.
        is_deleted: upstream has read the weights and deleted the layer (MiniCPM3's ``kv_b_proj``).
        device: where a deleted layer's weights go.
    """

    def __init__(
        self, name: str, module: torch.nn.Module, plan: LayerPlan, placeholders: Mapping[str, torch.nn.Parameter]
    ) -> None:
        self.name = name
        self.module = module
        self.plan = plan
        self.placeholders = dict(placeholders)
        self.scales = plan.scale_placeholders(module, placeholders)
        self.reads_whole = False
        self.is_deleted = False
        self.device = torch.device("cpu")
        self._parent: torch.nn.Module | None = None
        self._before_quantization = tuple(module._parameters)
        self._loaders = {key: _loader_of(placeholder) for key, placeholder in self._stand_ins.items()}

    def release_placeholders(self) -> None:
        """Keep look-alikes in place of the placeholders, which are about to get memory, or have it already."""
        self.placeholders = {
            key: twin(placeholder, torch.empty_like(placeholder, device="meta"))
            for key, placeholder in self.placeholders.items()
        }
        # Upstream reads the weights, and may look for scales to tell whether they are quantized.
        self.scales = {}
        self.reads_whole = True

    def note_deletion(self, model: torch.nn.Module) -> None:
        """Upstream has deleted the layer from ``model``: let its memory go, and show it in updates only."""
        self.is_deleted = True
        self._parent = model.get_submodule(self.name.rpartition(".")[0])
        weights = [weight for weight in self.module._parameters.values() if weight is not None and not weight.is_meta]
        self.device = weights[0].device if weights else self.device
        self.module._parameters = dict(self.placeholders)

    def seal(self) -> None:
        """Take off the placeholders what the first load has put around their loaders."""
        for key, placeholder in self._stand_ins.items():
            set_loader(placeholder, self._loaders[key])

    @contextmanager
    def shown(self, wrap: Callable[[str, WeightLoader], WeightLoader]) -> Iterator[None]:
        """Make the layer what it was before its first quantization, with wrapped loaders."""
        served, stand_ins = self.module._parameters, self._stand_ins
        shown = {key: served.get(key) for key in self._before_quantization} | stand_ins
        for key, placeholder in stand_ins.items():
            set_loader(placeholder, wrap(f"{self.name}.{key}", self._loaders[key]))
        self.module._parameters = dict(shown)
        key = self.name.rpartition(".")[2]
        if self._parent is not None:
            self._parent._modules[key] = self.module
        try:
            yield
        finally:
            if self._parent is not None:
                self._parent._modules.pop(key, None)
            changed = {key: new for key, new in self.module._parameters.items() if new is not shown.get(key)}
            self.module._parameters = served
            served.update({key: new for key, new in changed.items() if key not in stand_ins})
            self.seal()

    @property
    def _stand_ins(self) -> dict[str, torch.nn.Parameter]:
        return {**self.placeholders, **dict(self.scales.values())}


def _loader_of(parameter: torch.nn.Parameter) -> WeightLoader:
    loader: WeightLoader = parameter.weight_loader  # type: ignore[attr-defined]
    return loader
