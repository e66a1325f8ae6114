# SPDX-License-Identifier: Apache-2.0
"""What updates need to know of each model, kept while the model lives."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping

import torch

from sglang_overlay.core.executor import Executor, executor_for
from sglang_overlay.core.messages import shortened
from sglang_overlay.load.diagnostics import WantedShapes
from sglang_overlay.load.updatable_layer import UpdatableLayer
from sglang_overlay.update.session import NOTHING_KNOWN, WeightUpdate

logger = logging.getLogger(__name__)

_models: weakref.WeakKeyDictionary[torch.nn.Module, UpdatableModel] = weakref.WeakKeyDictionary()


class UpdatableModel:
    """What a model's updates need to know, and the open update.

    Args:
        layers: the layers that were quantized here.
        stock: names of layers that stock quantized, with the reasons.
        wanted: the shapes that the model expects of checkpoint tensors.

    Attributes:
        open: the open update.
        unopened: the error, if the current session's update could not be opened; its calls and its end raise it.
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
        """Open an update. One that was never ended is undone first.

        Args:
            executor: does the work; by default one without threads for the model's device.
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
    def is_in_session(self) -> bool:
        """Whether a session's update is open, or was to be opened and could not: all ranks agree on that."""
        return self.open is not None or self.unopened is not None

    @property
    def _device(self) -> torch.device:
        weights = (weight for layer in self.layers for weight in layer.module.parameters() if not weight.is_meta)
        return next((weight.device for weight in weights), torch.device("cpu"))

    def commit(self) -> None:
        """Close the open update, if any, and keep what it has written."""
        update, self.open = self.open, None
        if update is not None:
            update.close()

    def detach(self) -> WeightUpdate:
        """Hand over the open update, which succeeded, to a caller who will undo or close it.

        Raises:
            RuntimeError: no update is open.
        """
        if self.open is None:
            raise RuntimeError("no update is open")
        update, self.open = self.open, None
        return update

    def abort(self) -> None:
        """Undo and close the open update, if any."""
        update, self.open = self.open, None
        if update is not None:
            update.undo()
            update.close()


def remember(model: torch.nn.Module, updatable: UpdatableModel) -> None:
    """Keep ``updatable``, for updates, while ``model`` lives."""
    present = set(model.modules())
    for layer in updatable.layers:
        if layer.module not in present:
            layer.note_deletion(model)
    _models[model] = updatable


def any_in_session() -> bool:
    """Whether a model of this process is in a session of updates."""
    return any(model.is_in_session for model in _models.values())


def updatable(model: torch.nn.Module) -> UpdatableModel | None:
    """What was remembered for ``model``; None if nothing was."""
    return _models.get(model)
