# SPDX-License-Identifier: Apache-2.0
"""Layers that are not streamed: loaded in high precision, and quantized when they are complete."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from sglang_overlay.core import sentinel
from sglang_overlay.core.capture import storage_key
from sglang_overlay.core.executor import Executor
from sglang_overlay.core.layer import LayerStream
from sglang_overlay.core.moved_placeholders import MovedPlaceholders
from sglang_overlay.core.placeholders import materialize, set_loader
from sglang_overlay.core.sources import CheckpointSources
from sglang_overlay.load.checkpoint_watch import CheckpointWatch
from sglang_overlay.load.unstreamed import KeptWeight
from sglang_overlay.schemes.layer_plan import LayerPlan, quantize_whole


@dataclass(frozen=True)
class PendingLayer:
    """A layer whose placeholders exist, and wait for memory or to be streamed."""

    plan: LayerPlan
    device: torch.device
    placeholders: dict[str, torch.nn.Parameter]
    storage_keys: dict[str, int]

    def follow(self, moved: MovedPlaceholders) -> None:
        """Note where the model has moved the placeholders."""
        for name, placeholder in self.placeholders.items():
            if moved.first_key(placeholder) == self.storage_keys[name]:
                self.storage_keys[name] = storage_key(placeholder)

    def allocate(self) -> None:
        """Give the placeholders memory in high precision, of zeros."""
        for placeholder in self.placeholders.values():
            materialize(placeholder, torch.zeros_like(placeholder, device=self.device))


class Fallback:
    """The layers of a load that are not streamed.

    Upstream quantizes such a layer after the load, unless its scheme is not stock's, or stock's way is slow
    (``Executor.quantizes_late``): then it is quantized here. Loader threads call ``take_back``, for one layer each.

    Args:
        excluded: why certain layers, by name, must not be streamed.
        executor: gives the quantizers.
        sources: tells the names of checkpoint tensors.
        checkpoint: is told what was loaded into these layers.

    Attributes:
        deferred: by name, why upstream has to read the weights before they are quantized.
        reasons: by name, why other layers are not streamed.
        lost: by name, why layers had to be given up whose values are lost: the model has to be loaded anew.
    """

    def __init__(
        self, excluded: Mapping[str, str], executor: Executor, sources: CheckpointSources, checkpoint: CheckpointWatch
    ) -> None:
        self.excluded = excluded
        self.deferred: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self.lost: dict[str, str] = {}
        self._executor = executor
        self._sources = sources
        self._checkpoint = checkpoint
        self._weights: dict[torch.nn.Module, dict[str, KeptWeight]] = {}
        self._quantized_here: dict[torch.nn.Module, PendingLayer] = {}

    def keep(self, layer: torch.nn.Module, name: str, pending: PendingLayer, *, is_read: bool) -> None:
        """Have a layer loaded in high precision.

        Args:
            is_read: whether its weights come from the checkpoint; then it is watched what is loaded into them.
        """
        pending.allocate()
        if pending.plan.replaces_stock or (is_read and self._executor.quantizes_late and name in self.deferred):
            self._quantized_here[layer] = pending
        if not is_read:
            return
        is_marked = name in self.excluded
        weights = {}
        for key, placeholder in pending.placeholders.items():
            if is_marked:
                sentinel.fill(placeholder)
            weights[key] = KeptWeight(f"{name}.{key}", placeholder, self._sources, is_marked=is_marked)
            set_loader(placeholder, weights[key].wrap(placeholder.weight_loader))  # type: ignore[attr-defined]
        self._weights[layer] = weights

    def take_back(self, layer: torch.nn.Module, stream: LayerStream, pending: PendingLayer) -> None:
        """Go on with a layer whose placeholders have just got memory, with all that was written so far."""
        self._weights[layer] = {
            key: KeptWeight(part.name, stream.placeholders[key], self._sources, part.origins(), is_marked=True)
            for key, part in stream.streams.items()
        }
        if pending.plan.replaces_stock:
            self._quantized_here[layer] = pending

    @property
    def was_read(self) -> bool:
        """Whether anything was loaded into these layers."""
        return any(weight.origins() for weights in list(self._weights.values()) for weight in weights.values())

    def names(self) -> Iterator[str]:
        """Of all weights that are watched."""
        yield from (weight.name for weights in self._weights.values() for weight in weights.values())

    def finish(self, layer: torch.nn.Module) -> LayerPlan | None:
        """Tell of a layer that has been loaded, and quantize it, unless that is upstream's work.

        Returns:
            The plan of a layer that was quantized here.
        """
        weights = self._weights.pop(layer, {})
        # Before it is quantized: marks are no weights.
        missing = _missing(layer, weights)
        pending = self._quantized_here.pop(layer, None)
        plan = None
        if pending is not None and _is_loaded(layer, pending):
            plan = self._quantize(layer, pending, weights)
        self._tell(weights, missing)
        return plan

    def forget_deleted(self, model: torch.nn.Module) -> None:
        """Tell of layers that the model has deleted once it had read them, as minicpm3.py does, and free their memory.

        ``finish`` is never called for these.
        """
        for layer in self._weights.keys() - set(model.modules()):
            weights = self._weights.pop(layer)
            self._quantized_here.pop(layer, None)
            self._tell(weights, _missing(layer, weights))

    def clear(self) -> None:
        """Forget all layers: the model is built anew."""
        for kept in (self.deferred, self.reasons, self._weights, self._quantized_here):
            kept.clear()

    def _tell(self, weights: Mapping[str, KeptWeight], missing: Mapping[str, Sequence[int]]) -> None:
        for key, weight in weights.items():
            self._checkpoint.note(weight.name.rpartition(".")[0], weight, missing[key])
            weight.release()

    def _quantize(self, layer: torch.nn.Module, pending: PendingLayer, weights: Mapping[str, KeptWeight]) -> LayerPlan:
        storages = {}
        for key, weight in pending.placeholders.items():
            storages[key] = pending.plan.allocate(key, weight, pending.device)
            plan = pending.plan.parameter(key, weight, storages[key])
            plan = replace(plan, quantizer=self._executor.quantizer(plan.quantizer))
            found = quantize_whole(plan, weight.data)
            if key in weights:
                weights[key].largest = found
        pending.plan.register(layer, storages)
        return pending.plan


def _missing(layer: torch.nn.Module, weights: Mapping[str, KeptWeight]) -> dict[str, Sequence[int]]:
    """Units that were never written, by parameter."""
    for key, weight in weights.items():
        # A model may put another parameter in its place instead of loading it.
        found = layer._parameters.get(key)
        weight.weight = weight.weight if found is None else found
    return {key: weight.missing() for key, weight in weights.items()}


def _is_loaded(layer: torch.nn.Module, pending: PendingLayer) -> bool:
    """Whether upstream has left a layer the parameters that were loaded."""
    return all(layer._parameters.get(key) is weight for key, weight in pending.placeholders.items())
