# SPDX-License-Identifier: Apache-2.0
"""Check that a checkpoint's dtypes are what its config says: fp8 and high precision must not pass for each other.

torch silently casts one to the other, which loses the scales; stock SGLang serves the result.
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
"""Dtypes of values that need scales. ``float8_e8m0fnu`` is a dtype of scales."""
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
    """Makes the weight loaders of a newly built model refuse values of the wrong kind (``UnsupportedDtypeError``).

    Args:
        model: its parameters have the dtypes that the checkpoint should have; placeholders, high precision.
        sources: knows the names of checkpoint tensors.
    """

    def __init__(self, model: torch.nn.Module, sources: CheckpointSources) -> None:
        self._sources = sources
        self._changed: list[tuple[weakref.ref[torch.nn.Parameter], WeightLoader]] = []
        for name, parameter in model.named_parameters():
            loader = getattr(parameter, "weight_loader", None)
            if loader is not None and parameter.dtype in QUANTIZED | {torch.bfloat16, torch.float16}:
                set_loader(parameter, self._refusing(name, parameter.dtype, loader))
                if not parameter.is_meta:
                    # Not for placeholders: their own code restores loaders, and swap_tensors refuses weak references.
                    self._changed.append((weakref.ref(parameter), loader))

    def restore(self) -> None:
        """Restore the loaders of all parameters that still exist."""
        for reference, loader in self._changed:
            parameter = reference()
            if parameter is not None:
                set_loader(parameter, loader)
        self._changed.clear()

    def _refusing(self, name: str, dtype: torch.dtype, loader: WeightLoader) -> WeightLoader:
        refused, why = (HIGH_PRECISION, NOT_TRUE) if dtype in QUANTIZED else (QUANTIZED, NOT_SAID)

        @functools.wraps(loader)
        def load(*args: Any, **kwargs: Any) -> Any:
            # Not the parameter, whose attributes are slow to read while it is watched (``core/captured_views.py``).
            for value in (*args[1:], *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.dtype in refused:
                    raise UnsupportedDtypeError(
                        f"{name}, {dtype}, was to be filled from {self._sources.name_of(value) or 'a tensor'} of dtype "
                        f"{value.dtype}. {why}"
                    )
            return loader(*args, **kwargs)

        return load
