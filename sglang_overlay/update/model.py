# SPDX-License-Identifier: Apache-2.0
"""What is known of each model that can be updated, for as long as it lives."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping

import torch

from sglang_overlay.core.errors import shortened
from sglang_overlay.core.executor import Executor, executor_for
from sglang_overlay.load.diagnostics import WantedShapes
from sglang_overlay.load.updatable_layer import UpdatableLayer
from sglang_overlay.update.session import NOTHING_KNOWN, WeightUpdate

logger = logging.getLogger(__name__)

_models: weakref.WeakKeyDictionary[torch.nn.Module, UpdatableModel] = weakref.WeakKeyDictionary()


class UpdatableModel:
    """All that a model's updates need to know, and the update that is open.

    Args:
        layers: the layers that were quantized here.
        stock: why others went through stock's quantization, by name.
        wanted: what the model wants of its checkpoint's tensors.

    Attributes:
        open: the update that is open.
        unopened: why the session that is under way has none, where that went wrong; told by its calls and at its end.
    """

    def __init__(
        self, layers: Iterable[UpdatableLayer], stock: Mapping[str, str], wanted: WantedShapes = NOTHING_KNOWN
    ) -> None:
        self.layers = list(layers)
        self._wanted = wanted
        self.open: WeightUpdate | None = None
        self.unopened: Exception | None = None
        known = {layer.name for layer in self.layers}
        self._stock = {name: reason for name, reason in stock.items() if name not in known}

    def begin(self, executor: Executor | None = None) -> WeightUpdate:
        """Open an update, in place of one that was never ended.

        Args:
            executor: does the work; one of the model's device without threads unless given.
        """
        self.abort()
        if self._stock:
            logger.warning(
                "StreamFP8: stock SGLang quantized %s, and cannot update fp8 layers that it quantized: %s",
                "these layers" if self.layers else "this model",
                shortened([f"{name} ({reason})" for name, reason in self._stock.items()]),
            )
            self._stock = {}
        if executor is None:
            executor = executor_for(self._device, threads=False)
        self.open = WeightUpdate(self.layers, executor, self._wanted)
        return self.open

    @property
    def _device(self) -> torch.device:
        weights = (weight for layer in self.layers for weight in layer.module.parameters() if not weight.is_meta)
        return next((weight.device for weight in weights), torch.device("cpu"))

    def commit(self) -> None:
        """Close the open update, if any. What it has written stays."""
        update, self.open = self.open, None
        if update is not None:
            update.close()

    def detach(self) -> WeightUpdate:
        """The open update, which was right, for somebody else to undo or close."""
        if self.open is None:
            raise RuntimeError("no update is open")
        update, self.open = self.open, None
        return update

    def abort(self) -> None:
        """Close the open update, if any, and put back what it has overwritten."""
        update, self.open = self.open, None
        if update is not None:
            update.undo()
            update.close()


def remember(model: torch.nn.Module, updatable: UpdatableModel) -> None:
    """Keep what ``model``'s updates need for as long as the model lives."""
    present = set(model.modules())
    for layer in updatable.layers:
        if layer.module not in present:
            layer.note_deletion(model)
    _models[model] = updatable


def updatable(model: torch.nn.Module) -> UpdatableModel | None:
    """What was remembered for ``model``."""
    return _models.get(model)
