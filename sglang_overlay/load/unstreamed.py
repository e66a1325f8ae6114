# SPDX-License-Identifier: Apache-2.0
"""Weights that are not streamed: does the checkpoint hold them, and are they finite?

``KeptWeight`` is one that stock quantizes itself; it has to be loaded as any streamed one. ``UnstreamedParameters`` are
those that stay in high precision: norms, embeddings, routers, biases. SGLang has parameters among them that no
checkpoint holds (scales of the key-value cache, biases that only some checkpoints of a family have), so one that nobody
wrote is reported only where it is certain to belong to the checkpoint:

1. its like in another layer was written (``model.layers.3.input_layernorm.weight``), or
2. it is the weight of a linear layer or an embedding, whose memory SGLang leaves uninitialized, or of a norm that the
   model has once (``model.norm.weight``).

A draft model's embeddings and head are the target's, and an embedding model's head is not used.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_overlay.core import sentinel
from sglang_overlay.core.messages import shortened
from sglang_overlay.core.quantizers import magnitude, units_not_finite
from sglang_overlay.core.sentinel import Sentinels, is_watchable
from sglang_overlay.core.tensor_names import pattern_of

if TYPE_CHECKING:
    from sglang_overlay.core.layer import WeightLoader
    from sglang_overlay.core.sources import CheckpointSources


class KeptWeight:
    """A weight that stock quantizes itself, as one unit; for ``Diagnostics`` it is like a ``ParameterStream``.

    Args:
        name: for messages.
        weight: the parameter, in zeros or marks where nothing was loaded.
        sources: tells the names of checkpoint tensors.
        origins: checkpoint tensors that have been written into it already.
        is_marked: whether it was filled with marks beforehand, so that a part that nobody writes is found.

    Attributes:
        largest: magnitudes among its values, of all parts of it, where whoever quantized it has found them.
    """

    units = 1
    rewritten: Collection[str] = ()
    largest: torch.Tensor | None = None

    def __init__(
        self,
        name: str,
        weight: torch.Tensor,
        sources: CheckpointSources,
        origins: Sequence[str] = (),
        *,
        is_marked: bool = False,
    ) -> None:
        self.name = name
        self.weight = weight
        self._sources = sources
        self._origins = dict.fromkeys(origins)
        self._was_loaded = bool(origins)
        self._is_marked = is_marked

    def wrap(self, loader: WeightLoader) -> WeightLoader:
        """Upstream's loader, with it noted what it was given."""

        @functools.wraps(loader)
        def load(*args: Any, **kwargs: Any) -> Any:
            result = loader(*args, **kwargs)
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            self._origins.update(dict.fromkeys(filter(None, map(self._sources.name_of, tensors))))
            self._was_loaded = True
            return result

        return load

    def missing(self) -> list[int]:
        """The unit, where no loader ran and nobody wrote without one, as a dummy load does, or a part was left out.

        To be called once; marks that are left become zeros.
        """
        # Memory of another kind is the model's own.
        if self._is_marked and is_watchable(self.weight) and sentinel.clear(self.weight):
            return [0]
        return [] if self._was_loaded or self.weight.any() else [0]

    @property
    def magnitudes(self) -> torch.Tensor:
        """The unit's largest magnitude, on its device."""
        return (magnitude(self.weight.detach()) if self.largest is None else self.largest.max()).view(1)

    def origins(self, units: Sequence[int] | None = None) -> list[str]:
        """Names of the checkpoint tensors that were written, where they are known."""
        return list(self._origins)

    def release(self) -> None:
        """Forget the weight, which its loader refers to through this: its memory must be free once it is quantized."""
        del self.weight


class UnstreamedParameters:
    """The parameters of a model that stay as they are loaded.

    Args:
        model: just built.
        others: names of parameters that somebody else looks after.
    """

    def __init__(self, model: torch.nn.Module, others: Collection[str]) -> None:
        self._model = model
        watched = {
            name: parameter
            for name, parameter in model.named_parameters()
            if is_watchable(parameter) and name not in others
        }
        # Weakly: upstream may still replace them, and then their memory is free.
        self._parameters = {name: weakref.ref(parameter) for name, parameter in watched.items()}
        self._marks: Sentinels | None = Sentinels(watched)
        self._unwritten: list[str] = []

    def settle(self) -> None:
        """Note what has not been written. To be called when the weights have been read; later calls do nothing."""
        if self._marks is not None:
            self._unwritten = self._marks.lift(dict(self._model.named_parameters()))
            self._marks = None

    def missing(self, model_config: Any) -> list[str]:
        """Names of parameters that were never written and belong to the checkpoint."""
        return missed(self._model, self._unwritten, self._parameters.keys() - set(self._unwritten), model_config)

    def problems(self, missing: Sequence[str]) -> list[str]:
        """What to say of parameters that were not loaded, ``missing``, or that hold NaN or Inf."""
        not_finite = self.not_finite()
        found = []
        if missing:
            found.append(
                f"nothing was loaded into {len(missing)} parameters that the checkpoint should hold: "
                f"{shortened(missing)}. As in stock SGLang they keep what they were created with: ones, zeros, or "
                "uninitialized memory"
            )
        if not_finite:
            found.append(
                f"NaN or Inf in {len(not_finite)} parameters that are served in high precision: "
                f"{shortened(not_finite)}. Expect garbage"
            )
        return found

    def not_finite(self) -> list[str]:
        """Names of parameters that hold NaN or Inf, embeddings aside: they are too large to be read once more."""
        from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

        layers, written = _layers(self._model), self._parameters.keys() - set(self._unwritten)
        looked_at = {
            name: magnitude(parameter.detach())
            for name, parameter in self._model.named_parameters()
            if name in written
            and self._parameters[name]() is parameter
            and not isinstance(layers[name], VocabParallelEmbedding)
        }
        found = units_not_finite([*looked_at.values()])
        return [name for name, damaged in zip(looked_at, found, strict=True) if damaged]


def missed(
    model: torch.nn.Module, unwritten: Collection[str], written: Collection[str], model_config: Any
) -> list[str]:
    """Those of the ``unwritten`` parameters of a model that are certain to belong to its checkpoint."""
    patterns = {pattern_of(name) for name in written}
    layers = {name: layer for name, layer in _layers(model).items() if name in unwritten}
    return [
        name
        for name, layer in layers.items()
        if not _is_provided(layer, model_config) and (pattern_of(name) in patterns or _is_certain(name, layer))
    ]


def _layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layer of each parameter, by the parameter's name."""
    return {
        f"{prefix}.{name}" if prefix else name: layer
        for prefix, layer in model.named_modules()
        for name in layer._parameters
    }


def _is_provided(layer: torch.nn.Module, model_config: Any) -> bool:
    """Whether a layer's parameters come from somewhere else than the checkpoint, or are not used."""
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    if model_config.is_draft_model:
        return isinstance(layer, VocabParallelEmbedding)
    return not model_config.is_generation and isinstance(layer, ParallelLMHead)


def _is_certain(name: str, layer: torch.nn.Module) -> bool:
    """Whether a checkpoint must hold a parameter, whatever became of others like it."""
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if isinstance(layer, (LinearBase, VocabParallelEmbedding)):
        return name.endswith(".weight")
    # Subclasses have norms that only some checkpoints of a family hold.
    return type(layer) is RMSNorm and len(pattern_of(name)) == 1
