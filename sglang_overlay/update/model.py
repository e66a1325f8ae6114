# SPDX-License-Identifier: Apache-2.0
"""What updates need to know of each model, kept while the model lives."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from sglang_overlay.core.executor import Executor, executor_for
from sglang_overlay.core.messages import sentence, shortened
from sglang_overlay.load import metrics
from sglang_overlay.load.diagnostics import WantedShapes
from sglang_overlay.load.updatable_layer import UpdatableLayer
from sglang_overlay.observe.weights_report import UpdateReport
from sglang_overlay.update.weight_update import NOTHING_KNOWN, WeightUpdate

logger = logging.getLogger(__name__)

_models: weakref.WeakKeyDictionary[torch.nn.Module, UpdatableModel] = weakref.WeakKeyDictionary()


class UpdatableModel:
    """What a model's updates need to know, and the open update.

    Args:
        layers: the layers that were quantized here.
        stock: names of layers that stock quantized, with the reasons.
        wanted: the shapes that the model expects of checkpoint tensors.
        model_config: upstream's.

    Attributes:
        open: the open update.
        unopened: the error, if the current session's update could not be opened; its calls and its end raise it.
        arrived: names of the tensors of an open update that has no session, where a release has none: it is open as
            long as some of its weights wait for tensors of later calls.
    """

    def __init__(
        self,
        layers: Iterable[UpdatableLayer],
        stock: Mapping[str, str],
        wanted: WantedShapes = NOTHING_KNOWN,
        model_config: Any = None,
    ) -> None:
        self.layers = list(layers)
        self._model_config = model_config
        self._model: weakref.ReferenceType[torch.nn.Module] | None = None
        self._wanted = wanted
        self.open: WeightUpdate | None = None
        self.unopened: Exception | None = None
        self.arrived: set[str] = set()
        known = {layer.name for layer in self.layers}
        self._stock = {name: reason for name, reason in stock.items() if name not in known}

    def begin(self, executor: Executor | None = None) -> WeightUpdate:
        """Open an update. One that was never ended is undone first.

        Args:
            executor: does the work; by default that of the model's device.
        """
        self.abort("It was never ended.")
        if self._stock:
            logger.warning(
                "StreamFP8: stock SGLang quantized %s, and cannot update fp8 layers that it quantized: %s",
                "these layers" if self.layers else "this model",
                shortened([f"{name} ({reason})" for name, reason in self._stock.items()]),
            )
            self._stock = {}
        if executor is None:
            executor = executor_for(self._device)
        self.open = WeightUpdate(self.layers, executor, self._wanted)
        return self.open

    def wait_for_more(self) -> None:
        """Keep the open update, of a call without a session, for the calls that bring what its weights wait for."""
        if self.open is not None:
            self.arrived.update(self.open.given.names)
            self.open.keep_call()
            self.open.forget_undo()

    def stop_waiting(self, model: torch.nn.Module) -> None:
        """End an update that has no session: whole units keep their new values, the others were never replaced."""
        if self.open is None or not self.arrived:
            return
        logger.warning(
            "StreamFP8: another weight update begins, and of these weights the one before has brought only a part, "
            "which is dropped: %s",
            shortened(self.open.waiting(model)),
        )
        self.commit()

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
        update = self._taken()
        if update is not None:
            self._close(update)

    def abort(self, failure: str) -> None:
        """Undo and close the open update, if any.

        Args:
            failure: why.
        """
        update = self._taken()
        if update is not None:
            update.failure = failure
            update.undo()
            self._close(update)

    def _close(self, update: WeightUpdate) -> None:
        """Close an update that is not open any more, and tell what became of it."""
        model = None if self._model is None else self._model()
        report = None if model is None else self._report(update, model)
        update.close()
        if model is not None and report is not None:
            metrics.tell_update(model, report)

    def belongs_to(self, model: torch.nn.Module) -> None:
        """Note whose updates these are."""
        self._model = weakref.ref(model)

    def _report(self, update: WeightUpdate, model: torch.nn.Module) -> UpdateReport | None:
        try:
            return update.report(model, self._model_config)
        except Exception as error:
            # The update is what it is.
            logger.warning("StreamFP8: an update is not told of: %s: %s", type(error).__name__, sentence(error))
            return None

    def _taken(self) -> WeightUpdate | None:
        update, self.open, self.arrived = self.open, None, set()
        return update


def remember(model: torch.nn.Module, updatable: UpdatableModel) -> None:
    """Keep ``updatable``, for updates, while ``model`` lives."""
    present = set(model.modules())
    for layer in updatable.layers:
        if layer.module not in present:
            layer.note_deletion(model)
    updatable.belongs_to(model)
    _models[model] = updatable


def any_in_session() -> bool:
    """Whether a model of this process is in a session of updates."""
    return any(model.is_in_session for model in _models.values())


def updatable(model: torch.nn.Module) -> UpdatableModel | None:
    """What was remembered for ``model``; None if nothing was."""
    return _models.get(model)
