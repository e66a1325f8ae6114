# SPDX-License-Identifier: Apache-2.0
"""Layer-granular streaming, to compare with: a layer waits in high precision until all of it has come.

What vLLM's layerwise loading and SGLang's PR #17945 do. Never used for serving.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from sglang_overlay.core.capture import WriteCapture, storage_key
from sglang_overlay.core.pipeline import Pipeline
from sglang_overlay.core.staging import StagingAccount
from sglang_overlay.core.whole import WholeParameter
from sglang_overlay.upstream import eligibility
from sglang_overlay.upstream.load import ModelLoad, PendingLayer
from sglang_overlay.upstream.update import set_loader


class LayerGranularLoad(ModelLoad):
    """Gathers each layer's weights whole and has upstream quantize the layer when the last piece has come."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._quantized_layers: set[torch.nn.Module] = set()

    def finish(self, layer: torch.nn.Module) -> bool:
        """Whether the layer has been quantized while the checkpoint was read."""
        return super().finish(layer) or layer in self._quantized_layers

    def _start(self, layer: torch.nn.Module, name: str | None, pending: PendingLayer, pipeline: Pipeline) -> None:
        if name is None or eligibility.why_deferred(name):
            super()._start(layer, name, pending, pipeline)
            return
        gathered = _GatheredLayer(pending, self.account, functools.partial(self._quantize, layer))
        for placeholder in pending.placeholders.values():
            set_loader(placeholder, gathered.wrap(placeholder.weight_loader))  # type: ignore[attr-defined]

    def _quantize(self, layer: torch.nn.Module) -> None:
        layer.quant_method.process_weights_after_loading(layer)  # type: ignore[union-attr, operator]
        self._quantized_layers.add(layer)
        self.layers += 1
        self.units += 1


class _GatheredLayer:
    """The weights of one layer, in high precision from the first write to the last."""

    def __init__(self, pending: PendingLayer, account: StagingAccount, complete: Callable[[], None]) -> None:
        placeholders = pending.placeholders
        self._parts = {
            storage_key(placeholder): WholeParameter(name, placeholder, pending.device)
            for name, placeholder in placeholders.items()
        }
        self._size = sum(placeholder.nbytes for placeholder in placeholders.values())
        self._account = account
        self._complete = complete
        self._is_open = False

    def wrap(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        """Upstream's loader, with its writes gathered."""

        @functools.wraps(loader)
        def load(*args: Any, **kwargs: Any) -> Any:
            if not self._is_open:
                self._is_open = True
                self._account.add(self._size)
            with WriteCapture(self._parts):
                result = loader(*args, **kwargs)
            if all(part.values is not None for part in self._parts.values()):
                self._close()
            return result

        return load

    def _close(self) -> None:
        self._complete()
        for part in self._parts.values():
            part.reset()
        self._account.add(-self._size)
        self._is_open = False
