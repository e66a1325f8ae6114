# SPDX-License-Identifier: Apache-2.0
"""Does a checkpoint hold what its config says? Values of fp8 and of high precision must not pass for each other.

torch casts one to the other without a word, and the scales are lost: stock SGLang serves the result.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch

from sglang_overlay.core.errors import UnsupportedDtypeError
from sglang_overlay.core.placeholders import set_loader

if TYPE_CHECKING:
    from sglang_overlay.core.layer import WeightLoader
    from sglang_overlay.core.sources import CheckpointSources

QUANTIZED = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})
"""Dtypes of values that mean something with their scales only. ``float8_e8m0fnu`` is one of scales."""
HIGH_PRECISION = frozenset({torch.bfloat16, torch.float16, torch.float32, torch.float64})

NOT_SAID = (
    "Its scales would be lost: nothing tells SGLang that this checkpoint is quantized already. Give config.json the "
    "quantization_config that belongs to it, or use the unquantized checkpoint."
)
NOT_TRUE = (
    "It would be cast to fp8 without a scale: quantization_config (in config.json or --json-model-override-args) says "
    "that this checkpoint is quantized already. Remove quantization_config and use --quantization fp8, or list the "
    "layer in its modules_to_not_convert."
)


class StoredDtypes:
    """Makes the weight loaders of a model that has just been built refuse values of the wrong kind.

    Args:
        model: with the parameters that its loaders are going to fill; placeholders have their high-precision dtype.
        sources: tells the names of checkpoint tensors.
    """

    def __init__(self, model: torch.nn.Module, sources: CheckpointSources) -> None:
        self._sources = sources
        self._changed: list[tuple[weakref.ref[torch.nn.Parameter], WeightLoader]] = []
        for name, parameter in model.named_parameters():
            loader = getattr(parameter, "weight_loader", None)
            if loader is not None and parameter.dtype in QUANTIZED | {torch.bfloat16, torch.float16}:
                set_loader(parameter, self._refusing(name, parameter.dtype, loader))
                if not parameter.is_meta:
                    # A placeholder gets its loader back from who made it, and cannot be swapped while a reference
                    # looks at it.
                    self._changed.append((weakref.ref(parameter), loader))

    def restore(self) -> None:
        """Give all parameters that are still there their own loaders back."""
        for reference, loader in self._changed:
            parameter = reference()
            if parameter is not None:
                set_loader(parameter, loader)
        self._changed.clear()

    def _refusing(self, name: str, dtype: torch.dtype, loader: WeightLoader) -> WeightLoader:
        refused, why = (HIGH_PRECISION, NOT_TRUE) if dtype in QUANTIZED else (QUANTIZED, NOT_SAID)

        @functools.wraps(loader)
        def load(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.dtype in refused:
                    raise UnsupportedDtypeError(
                        f"{name}, {dtype}, was to be filled from {self._sources.name_of(value) or 'a tensor'} of dtype "
                        f"{value.dtype}. {why}"
                    )
            return loader(*args, **kwargs)

        return load
