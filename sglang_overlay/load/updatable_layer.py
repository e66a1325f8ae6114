# SPDX-License-Identifier: Apache-2.0
"""What a load keeps of a layer, so that the layer's weights can be updated later."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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
        is_rearranged: upstream has rearranged the quantized weights, or computed further tensors from them.
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
        self.is_rearranged = False
        self.device = torch.device("cpu")
        self._parent: torch.nn.Module | None = None
        self._before_quantization = tuple(module._parameters)
        self._companions = self._loaded_beside(plan.fills)
        self._loaders = {
            key: _loader_of(placeholder) for key, placeholder in {**self._companions, **self._stand_ins}.items()
        }
        self._processing: tuple[Callable[..., None], Any] | None = None
        self._quantized_names: frozenset[str] | None = None
        self._added: frozenset[str] = frozenset()

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

    def note_processing(self, original: Callable[..., None], method: Any, *, is_quantized: bool) -> None:
        """Upstream is about to process the layer for its kernel.

        Args:
            original: upstream's ``process_weights_after_loading``, unbound.
            method: the layer's quantization method.
            is_quantized: whether the layer holds its quantized weights; otherwise upstream quantizes them itself.
        """
        self._processing = original, method
        if is_quantized and self._quantized_names is None:
            self._quantized_names = self._tensor_names()

    def seal(self) -> None:
        """Take off the placeholders what the first load has put around their loaders."""
        for key, placeholder in self._stand_ins.items():
            set_loader(placeholder, self._loaders[key])

    def conclude(self) -> None:
        """The load is over: seal the layer, and look at what upstream has made of it."""
        self.seal()
        if self.is_deleted or self._processing is None:
            return
        if self._quantized_names is not None:
            self._added = self._tensor_names() - self._quantized_names
        self.is_rearranged = bool(self._added) or self.plan.registered(self.module, self.placeholders) is None

    @property
    def companions(self) -> Mapping[str, torch.nn.Parameter]:
        """Placeholders of what is loaded beside the weights of a rearranged layer, such as its bias, by name."""
        return self._companions if self.is_rearranged else {}

    def as_loaded(self, served: Mapping[str, torch.nn.Parameter | None]) -> torch.nn.Module:
        """A copy of the layer as it was before processing, without what weight loaders fill.

        It shares no parameters with the layer, nor anything that processing has added: that may be written to in place.

        Args:
            served: the layer's own parameters.
        """
        added = self._added
        copied = type(self.module).__new__(type(self.module))
        copied.__dict__.update({name: value for name, value in vars(self.module).items() if name not in added})
        copied._modules = dict(self.module._modules)
        copied._buffers = {name: value for name, value in self.module._buffers.items() if name not in added}
        own = {*self.placeholders, *self._companions, *self.plan.fills}
        copied._parameters = {
            key: None if (weight := served.get(key)) is None else twin(weight, weight.data.clone())
            for key in self._before_quantization
            if key not in own
        }
        return copied

    def process(self, plan: LayerPlan, layer: torch.nn.Module) -> None:
        """Process ``layer``, a copy of this one that holds quantized weights, as upstream has processed this one.

        Args:
            plan: has registered the weights.
            layer: the copy.
        """
        assert self._processing is not None
        original, method = self._processing
        plan.process(functools.partial(original, method, layer), method, layer)

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
        return {**self.placeholders, **dict(self.scales.values()), **self.companions}

    def _loaded_beside(self, fills: frozenset[str]) -> dict[str, torch.nn.Parameter]:
        return {
            key: twin(weight, torch.empty_like(weight, device="meta"))
            for key, weight in self.module._parameters.items()
            if weight is not None and key not in {*self.placeholders, *fills} and hasattr(weight, "weight_loader")
        }

    def _tensor_names(self) -> frozenset[str]:
        named = [*self.module._parameters.items(), *self.module._buffers.items(), *vars(self.module).items()]
        return frozenset(name for name, value in named if isinstance(value, torch.Tensor))


def _loader_of(parameter: torch.nn.Parameter) -> WeightLoader:
    loader: WeightLoader = parameter.weight_loader  # type: ignore[attr-defined]
    return loader
