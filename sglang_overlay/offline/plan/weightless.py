# SPDX-License-Identifier: Apache-2.0
"""Build and load a model on tensors that have shape, dtype and device, but no memory.

PyTorch's ``FakeTensorMode`` does most of the work. This module adds:

- parameters of upstream's own classes keep their class and attributes (``torch.nn.Parameter`` drops them for any data
  that is not a plain tensor);
- small tensors on the CPU are real, for code that looks at contents (tables, permutations);
- checkpoint tensors are real too, but over an empty file, and are never read;
- single numbers keep their value; unknown numbers are zero, and searches find nothing;
- every allocation is counted in an account.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_overlay.offline.plan.account import Account
from sglang_overlay.offline.plan.device_work import ALLOCATIONS, count
from sglang_overlay.offline.plan.replacing import replaced

aten = torch.ops.aten

REAL_BELOW = 1 << 20
"""CPU tensors of fewer bytes than this have real memory."""


@contextmanager
def weightless(account: Account) -> Iterator[None]:
    """Make tensors that are created inside the block weightless, and count them in ``account``."""
    mode = _fake_mode()
    with _own_parameter_classes(), mode, _Weightless(account, mode):
        yield


def _fake_mode() -> FakeTensorMode:
    mode = FakeTensorMode()
    # Disable its memo of weak references to tensors, which ``torch.utils.swap_tensors`` refuses.
    mode.fake_tensor_converter.meta_converter.tensor_memo = _Forgetful()  # type: ignore[assignment]
    return mode


class _Forgetful(dict[Any, Any]):
    def __setitem__(self, key: Any, value: Any) -> None:
        pass


class _Weightless(TorchDispatchMode):
    """Decides for each operation whether it runs for real, on fake tensors, or not at all."""

    def __init__(self, account: Account, fakes: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._account = account
        self._fakes = fakes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        kwargs = kwargs or {}
        if _is_composite(func):
            # An operation called by another mode's handler arrives undecomposed, but its parts are what counts.
            with self:
                return func.decompose(*args, **kwargs)
        if not _is_view(func):
            count(self._account.work, self._account.device, func, args, kwargs)
        has_fake = any(issubclass(kind, FakeTensor) for kind in types)
        if has_fake and func in _INSTEAD:
            return _INSTEAD[func](self._account, args)
        if has_fake or _needs_fake(func, args, kwargs):
            result = _on_fakes(self._fakes, func, args, kwargs)
        else:
            with unset_fake_temporarily():
                result = func(*args, **kwargs)
        if _is_mutable(func) and isinstance(args[0], torch.Tensor):
            self._account.written(args[0], _elements_put(args) if func in _PUTS else args[0].numel())
        elif not _is_view(func):
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self._account.made(tensor, filled=func not in ALLOCATIONS)
        return result

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def _needs_fake(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation on real tensors, or on none, has to run on fake ones."""
    device = torch.device(kwargs.get("device") or "cpu").type
    if device != "cpu":
        return device != "meta"
    if func in _FACTORIES:
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        return bool(prod(args[0]) * dtype.itemsize >= REAL_BELOW)
    if _is_view(func):
        return False
    return any(_is_large(value) for value in args)


def _on_fakes(mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is aten.equal.default:
        # Nothing is known to differ.
        return True
    if func in _PLAIN or _is_view(func):
        result = _without_special_cases(mode, func, args, kwargs)
    else:
        result = func(*map(_stand_in, args), **kwargs)
    if isinstance(result, FakeTensor) and result.numel() == 1 and not _is_view(func) and func not in ALLOCATIONS:
        _follow_number(func, args, kwargs, result)
    return result


def _without_special_cases(
    mode: FakeTensorMode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FakeTensor | list[FakeTensor]:
    """Run the operation on ``meta`` tensors, as ``FakeTensorMode`` does in the end, but several times faster."""
    device = torch.device(kwargs["device"]) if kwargs.get("device") else _device_of(args)
    if "device" in kwargs:
        kwargs = {**kwargs, "device": "meta"}
    with in_kernel_invocation_manager(mode):
        found = func(*[_on_meta(value) for value in args], **kwargs)
    if isinstance(found, (tuple, list)):
        return [FakeTensor(mode, tensor, device) for tensor in found]
    return FakeTensor(mode, found, device)


def _device_of(args: Sequence[Any]) -> torch.device:
    found = next(value for value in args if isinstance(value, torch.Tensor))
    device: torch.device = found.fake_device if isinstance(found, FakeTensor) else found.device
    return device


def _on_meta(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def _stand_in(value: Any) -> Any:
    """``value`` with fake tensors in place of real ones."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_stand_in, value))
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return value
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def _follow_number(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: FakeTensor) -> None:
    """Compute a single number from single numbers, if one of them is known or the result is boolean."""
    tensors = [value for value in args if isinstance(value, torch.Tensor)]
    if any(tensor.numel() != 1 for tensor in tensors) or any(
        isinstance(value, (tuple, list)) and value for value in args
    ):
        return
    if tensors and result.dtype != torch.bool and all(_number_of(tensor) is None for tensor in tensors):
        return
    on_cpu = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
    known = [_known(value) for value in args]
    with unset_fake_temporarily():
        number = func(*known, **on_cpu)
    _remember(result, number)


def _remember(tensor: torch.Tensor, value: Any) -> None:
    # On the storage, which all views share and which keeps its attributes while it lives.
    tensor.untyped_storage()._streamfp8_number = value  # type: ignore[attr-defined]


def _number_of(tensor: torch.Tensor) -> Any:
    return getattr(tensor.untyped_storage(), "_streamfp8_number", None) if isinstance(tensor, FakeTensor) else tensor


def _known(value: Any) -> Any:
    """A real tensor in place of a fake one with one number, zero if that is unknown; other values unchanged."""
    if not isinstance(value, FakeTensor):
        return value
    known = _number_of(value)
    with unset_fake_temporarily():
        number = 0 if known is None else known.item() if isinstance(known, torch.Tensor) else known
        return torch.full(value.shape, number, dtype=value.dtype)


def _elements_put(args: tuple[Any, ...]) -> int:
    """Number of elements that an operation of ``_PUTS`` writes: one for each index, or each value."""
    counts: list[int] = [tensor.numel() for tensor in (*args[1], args[2]) if tensor is not None]
    return max(counts)


def _is_large(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_is_large(item) for item in value)
    return isinstance(value, torch.Tensor) and not value.is_meta and value.numel() * value.element_size() >= REAL_BELOW


@cache
def _is_composite(func: Any) -> bool:
    return bool(func._can_decompose())


@cache
def _is_view(func: Any) -> bool:
    return bool(func.is_view)


@cache
def _is_mutable(func: Any) -> bool:
    return bool(func._schema.is_mutable)


def _copy(account: Account, args: tuple[Any, ...]) -> torch.Tensor:
    destination, source = args[0], args[1]
    if not isinstance(source, torch.Tensor):
        # copy_ may also get a plain number.
        return _fill(account, args)
    if source.shape != destination.shape:
        source.expand(destination.shape)
    if destination.device != source.device and not destination.is_contiguous():
        # PyTorch copies between devices through contiguous memory on the destination's device.
        account.pulse(destination.numel() * destination.element_size())
    account.written(destination, destination.numel())
    if destination.numel() == 1:
        _remember(destination, _known(source))
    return destination  # type: ignore[no-any-return]


def _fill(account: Account, args: tuple[Any, ...]) -> torch.Tensor:
    destination, value = args[0], args[1] if len(args) > 1 else 0
    account.written(destination, destination.numel())
    if destination.numel() == 1:
        _remember(destination, _known(value))
    return destination  # type: ignore[no-any-return]


def _number(_account: Account, args: tuple[Any, ...]) -> float | int | bool:
    known = _known(args[0])
    with unset_fake_temporarily():
        number: float | int | bool = known.item()
    return number


def _found_nothing(_account: Account, args: tuple[Any, ...]) -> torch.Tensor:
    return torch.empty((0, args[0].ndim), dtype=torch.int64, device=args[0].device)


_INSTEAD = {
    aten.copy_.default: _copy,
    aten.fill_.Scalar: _fill,
    aten.fill_.Tensor: _fill,
    aten.zero_.default: _fill,
    aten._local_scalar_dense.default: _number,
    aten.nonzero.default: _found_nothing,
}

_FACTORIES = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_permuted.default,
        aten.empty_strided.default,
        aten.full.default,
        aten.ones.default,
        aten.rand.default,
        aten.randn.default,
        aten.zeros.default,
    }
)
"""Operations that create a tensor without inputs; their first argument is its shape."""

_PLAIN = _FACTORIES | {
    aten._to_copy.default,
    aten.empty_like.default,
}
"""Operations, besides views, that run for every tensor of a model and need no special cases for fake tensors."""

_PUTS = frozenset({aten.index_put_.default, aten._index_put_impl_.default})
"""Operations that write to some elements of their first argument."""


@contextmanager
def _own_parameter_classes() -> Iterator[None]:
    """Make ``Parameter`` subclasses keep their class over fake data, also when two parameters are swapped."""
    make, swap = Parameter.__new__, torch.utils.swap_tensors

    def make_own(cls: type[Parameter], data: Any = None, requires_grad: bool = True) -> Any:  # noqa: FBT001
        made = make(cls, data, requires_grad)
        if isinstance(made, FakeTensor) and cls is not Parameter and not isinstance(made, cls):
            made.__class__ = _fake_class(cls)
        return made

    def swap_own(one: torch.Tensor, other: torch.Tensor) -> None:
        swap(one, other)  # type: ignore[no-untyped-call]
        for tensor in (one, other):
            tensor.__class__ = _class_for(tensor)

    with replaced(Parameter, "__new__", make_own), replaced(torch.utils, "swap_tensors", swap_own):
        yield


def _class_for(tensor: torch.Tensor) -> Any:
    """The class for a tensor that may have become fake, or real, by swapping."""
    plain = getattr(type(tensor), "_plain_class", type(tensor))
    is_fake = torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)
    return _fake_class(plain) if is_fake and not issubclass(plain, FakeTensor) else plain


@cache
def _fake_class(cls: Any) -> Any:
    return type(cls)(cls.__name__, (cls, FakeTensor), {"__module__": cls.__module__, "_plain_class": cls})


class EmptyFile:
    """Creates tensors over an empty file, mapped like a checkpoint: they may be viewed, but must not be read.

    Args:
        size: bytes of the largest tensor.
    """

    def __init__(self, size: int) -> None:
        with tempfile.TemporaryFile() as file:
            file.truncate(max(size, 1))
            self._map = mmap.mmap(file.fileno(), max(size, 1), access=mmap.ACCESS_COPY)

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous CPU tensor with its own storage."""
        if not prod(shape):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=prod(shape)).view(shape)
