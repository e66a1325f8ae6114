# SPDX-License-Identifier: Apache-2.0
"""Updates of models that nothing was remembered of: an fp8 checkpoint, or a loader that is not streamed.

SGLang updates these by itself. It casts high-precision values into fp8 parameters under the scales that are there, and
answers success. Here that is an error. Values in fp8 are none of this package's business.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_overlay.core.capture import storage_key
from sglang_overlay.errors import WeightUpdateError
from sglang_overlay.load.stored_dtypes import HIGH_PRECISION, QUANTIZED
from sglang_overlay.update.loaders_view import load_weights_given, loaders_wrapped

if TYPE_CHECKING:
    from sglang_overlay.core.layer import WeightLoader

NamedTensors = Iterable[tuple[str, torch.Tensor]]

_quantizing: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
"""Models whose ``load_weights`` quantizes what it is given."""


def note_quantizing(model: torch.nn.Module) -> None:
    """Leave a model alone whose loader has given it a ``load_weights`` that quantizes (``flash_rl``)."""
    _quantizing.add(model)


def casts_refused(model: torch.nn.Module) -> AbstractContextManager[None]:
    """Context in which ``model.load_weights`` casts nothing to fp8.

    Raises:
        WeightUpdateError: from ``load_weights``; what it has written by then stays.
    """
    if not _quantized_by_sglang(model):
        return nullcontext()
    return load_weights_given(model, functools.partial(_guarded, model))


def refuse_casts(model: torch.nn.Module, tensors: NamedTensors) -> None:
    """Check values that are to be written into the parameters with these names.

    Raises:
        WeightUpdateError: some would be cast to fp8.
    """
    quantized = _quantized_by_sglang(model)
    for name, tensor in tensors:
        if name in quantized and tensor.dtype in HIGH_PRECISION:
            raise _error(name, tensor.dtype)


@contextmanager
def _guarded(model: torch.nn.Module, weights: NamedTensors) -> Iterator[NamedTensors]:
    # Anew: SGLang may have replaced parameters since, to undo how it packs them.
    quantized = {storage_key(weight): name for name, weight in _quantized_by_sglang(model).items()}

    def wrap(_: str, loader: WeightLoader) -> WeightLoader:
        @functools.wraps(loader)
        def load(*args: Any, **kwargs: Any) -> Any:
            with _CastRefusal(quantized):
                return loader(*args, **kwargs)

        return load

    with loaders_wrapped(model, wrap), _CastRefusal(quantized):
        yield weights


class _CastRefusal(TorchDispatchMode):
    """Refuses to copy high precision to the memory of ``quantized``, names by ``storage_key``."""

    def __init__(self, quantized: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._quantized = quantized

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and getattr(args[1], "dtype", None) in HIGH_PRECISION:
            name = self._quantized.get(storage_key(args[0]))
            if name is not None:
                raise _error(name, args[1].dtype)
        return func(*args, **(kwargs or {}))


def _quantized_by_sglang(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The fp8 parameters of layers that SGLang's own fp8 methods serve, by name, where nothing quantizes for them."""
    if model in _quantizing:
        return {}
    from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod, Fp8MoEMethod

    methods = (Fp8LinearMethod, Fp8MoEMethod)
    return {
        f"{prefix}.{name}" if prefix else name: weight
        for prefix, layer in model.named_modules()
        if isinstance(getattr(layer, "quant_method", None), methods)
        for name, weight in layer._parameters.items()
        if weight is not None and weight.dtype in QUANTIZED
    }


def _error(name: str, dtype: torch.dtype) -> WeightUpdateError:
    return WeightUpdateError(
        f"{name} is served as fp8 that SGLang itself has loaded, and does not quantize again: these {dtype} values "
        "would be cast under the old scale. What this update brought before them may be served: start the server with "
        "the new weights, or update it with fp8 values and their scales"
    )
