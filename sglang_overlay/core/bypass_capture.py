# SPDX-License-Identifier: Apache-2.0
"""Capture what a model does to placeholders outside of their weight loaders.

Some models write weights themselves: ``default_weight_loader(param, w)`` where the parameter has a loader of its own
(mimo_v2.py, inkling.py), ``param.data[a:b].copy_(w)`` (kimi_k3.py). On the meta device such a write is silently lost,
and a dispatch mode around all of ``load_weights`` would cost microseconds for each of its operations. Here ``copy_``,
through which tensors are read too, and other operations in place get another kernel for the meta device, as
``torch.library`` allows: torch calls it, in any thread, if one of their tensors has no memory; other tensors are not
affected. Of writes inside wrapped loaders, only those through views that are older than the call come this far.

Limitations: operations with ``out=`` and rare ones that are not in ``_CHANGES`` have no such kernel. What they write is
missed, and reported as missing unless it had been written before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch.library import Library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sglang_overlay.core.capture import storage_key
from sglang_overlay.core.layer import LayerStream

NO_DATA = "Cannot copy out of meta tensor; no data!"
"""What torch says where a tensor without memory is read."""

_CHANGES = (
    *("copy_", "fill_.Scalar", "fill_.Tensor", "zero_"),
    *("add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor", "pow_.Scalar", "lerp_.Tensor", "lerp_.Scalar"),
    *("addcmul_", "addcdiv_", "addmm_", "neg_", "abs_", "clamp_", "clamp_min_", "clamp_max_", "round_", "nan_to_num_"),
    *("index_put_", "index_copy_", "index_add_", "index_fill_.int_Scalar", "index_fill_.int_Tensor"),
    *("masked_fill_.Scalar", "masked_fill_.Tensor", "masked_scatter_"),
    *("scatter_.src", "scatter_.value", "scatter_add_", "normal_", "uniform_"),
)
"""Change their first tensor in place, and keep its shape. Others, such as ``add_.Scalar``, call these."""


_MAKES_LIKE = (
    *(f"{kind}_like" for kind in ("empty", "zeros", "ones", "full", "rand", "randn", "randint")),
    *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
)
"""Ask a tensor for nothing but its form."""


@contextmanager
def meta_kernels(kernels: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Context in which operators, by name, run these functions for tensors without memory."""
    library = Library("aten", "IMPL")
    try:
        for name, kernel in kernels.items():
            library.impl(name, kernel, "Meta", allow_override=True)
        yield
    finally:
        library._destroy()


@dataclass(frozen=True)
class _Placeholder:
    """``parameter`` gets memory in place; ``without_memory`` then still is what the model may have views of."""

    layer: LayerStream
    parameter: torch.nn.Parameter
    without_memory: torch.Tensor
    device: torch.device

    def memory_of(self, view: torch.Tensor, func: Any) -> torch.Tensor:
        """The same view of the parameter as in stock: ``func`` needs it."""
        if self.layer.is_inside:
            raise NotImplementedError(NO_DATA)
        self.layer.return_to_stock(f"{func} is applied to it outside of its weight loader")
        flat = self.parameter.data.view(-1).view(view.dtype)
        return flat.as_strided(view.shape, view.stride(), view.storage_offset())


class BypassCapture(AbstractContextManager[None]):
    """Captures operations on placeholders that bypass their wrapped loaders, in all threads, while it is entered.

    Plain writes go to the layer's streams. For any other operation the layer falls back to stock, and the operation is
    executed on the real parameter.

    Args:
        layers: those that are being streamed.
    """

    _active: ClassVar[list[BypassCapture]] = []
    """Those entered. Only the thread that loads a model changes it; loader threads read it, and end before the load."""

    def __init__(self, layers: Iterable[LayerStream]) -> None:
        self._placeholders = {
            storage_key(layer.placeholders[key]): _Placeholder(
                layer, layer.placeholders[key], layer.placeholders[key].data, stream.storage.weight.device
            )
            for layer in layers
            for key, stream in layer.streams.items()
        }
        self._kernels = ExitStack()

    def __enter__(self) -> None:
        changes = {name: functools.partial(_run, _operation(name)) for name in _CHANGES}
        self._kernels.enter_context(meta_kernels({**changes, "scalar_tensor": _scalar}))
        self._active.append(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._active.remove(self)
        self._placeholders.clear()
        self._kernels.close()

    @classmethod
    def find(cls, tensor: torch.Tensor) -> _Placeholder | None:
        """The placeholder that a tensor is a view of."""
        if not tensor.is_meta:
            return None
        key = storage_key(tensor)
        found = (capture._placeholders.get(key) for capture in cls._active)
        return next((placeholder for placeholder in found if placeholder is not None), None)


class PlaceholderReads(TorchDispatchMode):
    """Finds what reads placeholders in this thread, beside an entered ``BypassCapture``: their layers go back to stock.

    Nothing else tells which weights a model computes with, since the result has no memory either. It costs some
    microseconds for each operation, so only a load that has failed is repeated with it.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (args, kwargs or {})
        found = next(filter(None, map(BypassCapture.find, _tensors(given))), None)
        if found is None or _is_view(func) or func in _captured():
            return func(*args, **given[1])
        if func.overloadpacket.__name__ in _MAKES_LIKE:
            return func(*args, **{"device": found.device, **given[1]})
        real_args, real_kwargs = tree_map_only(torch.Tensor, functools.partial(_real, func), given)
        return func(*real_args, **real_kwargs)


def _tensors(given: Any) -> Iterator[torch.Tensor]:
    return (value for value in tree_leaves(given) if isinstance(value, torch.Tensor))


def _is_view(func: Any) -> bool:
    """Whether the result shares the memory of an argument, which is not written."""
    results = func._schema.returns
    return bool(results) and all(one.alias_info is not None and not one.alias_info.is_write for one in results)


@functools.cache
def _captured() -> frozenset[Any]:
    return frozenset(map(_operation, _CHANGES))


def _operation(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _real(func: Any, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, with memory if it is a view of a placeholder."""
    placeholder = BypassCapture.find(tensor)
    return tensor if placeholder is None else placeholder.memory_of(tensor, func)


def _scalar(value: Any, **options: Any) -> torch.Tensor:
    """``parameter[...] = 1.0`` makes its scalar on the destination's device, where the value would be lost."""
    return torch.scalar_tensor(value, dtype=options.get("dtype"), device="cpu")


def _run(func: Any, changed: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """``func``, which changes ``changed`` in place; one of its tensors has no memory."""
    found = BypassCapture.find(changed)
    if found is not None and found.layer.take(func, (changed, *args), kwargs):
        return changed
    if found is None and changed.is_meta:
        # A tensor of somebody else without memory, perhaps computed from a placeholder: it has no values to change.
        return changed

    given = tree_map_only(torch.Tensor, functools.partial(_real, func), (changed, args, kwargs))
    if any(isinstance(value, torch.Tensor) and value.is_meta for value in tree_leaves(given)):
        raise NotImplementedError(NO_DATA)
    func(given[0], *given[1], **given[2])
    return changed
