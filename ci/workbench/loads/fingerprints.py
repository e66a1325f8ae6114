"""Everything that two loads of a model must agree on, tensor by tensor. Torch only.

``named_tensors`` and ``model_bytes`` do the same as ``tensors_of`` and ``stored_bytes`` in ``sglang_overlay/load``, but
deliberately share no code with them: a check must not repeat a mistake of the code it checks.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(kind, name, tensor) of all parameters, then all buffers, then all tensors in modules' ``__dict__``."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield "parameter", name, parameter
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield "buffer", name, buffer
    for prefix, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in ("_parameters", "_buffers", "_modules"):
                for path, tensor in _tensors_in(value, f"{prefix}.{key}".lstrip(".")):
                    yield "attribute", path, tensor


def _tensors_in(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors in `value` and in lists, tuples and dicts under it."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for position, item in enumerate(value):
            yield from _tensors_in(item, f"{path}[{position}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors_in(item, f"{path}[{key!r}]")


@dataclass(frozen=True)
class TensorPrint:
    """The facts about one tensor that two loads must agree on.

    Args:
        kind: ``parameter``, ``buffer``, or ``attribute`` for a tensor found in a module's ``__dict__``.
        sha256: of the values in row-major order, so it does not depend on strides; those are compared beside it.
        class_name: of the Python object, e.g. ``Parameter`` or ``ModelWeightParameter``.
        requires_grad: whether autograd would follow it.
        slices: of three dimensions, a checksum for each index of the first: an expert's.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: str
    sha256: str
    class_name: str
    requires_grad: bool
    slices: tuple[int, ...] = ()


def fingerprint(kind: str, tensor: torch.Tensor) -> TensorPrint:
    """The print of `tensor`."""
    return TensorPrint(
        kind=kind,
        dtype=str(tensor.dtype),
        shape=tuple(tensor.shape),
        stride=tensor.stride(),
        device=str(tensor.device),
        sha256=hash_of(tensor),
        class_name=type(tensor).__name__,
        requires_grad=tensor.requires_grad,
        slices=tuple(zlib.crc32(_bytes_of(part)) for part in tensor) if _has_slices(tensor) else (),
    )


def model_prints(model: torch.nn.Module) -> dict[str, TensorPrint]:
    """Name -> print, parameters in ``named_parameters`` order, then buffers, then attributes."""
    return {name: fingerprint(kind, tensor) for kind, name, tensor in named_tensors(model)}


def model_flags(model: torch.nn.Module) -> dict[str, str]:
    """Name -> value of each plain attribute of a module, its quantization method or a parameter.

    Post-processing sets such attributes for kernels.
    """
    holders: dict[str, Any] = dict(model.named_modules())
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            holders[f"{prefix}.quant_method"] = method
    found = {
        f"{name}.{key}": repr(value)
        for name, holder in holders.items()
        for key, value in vars(holder).items()
        if _is_plain(value)
    }
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.update({f"{name}:{key}": repr(value) for key, value in vars(parameter).items() if _is_plain(value)})
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.Size))


def hash_of(tensor: torch.Tensor) -> str:
    """SHA-256 of the values in row-major order; of no bytes for a meta tensor."""
    if tensor.device.type == "meta":
        return "meta"
    return hashlib.sha256(_bytes_of(tensor)).hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    plain = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return memoryview(plain.numpy())  # type: ignore[arg-type]


def _has_slices(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 3 and tensor.device.type != "meta"


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of all distinct storages behind the model's tensors."""
    storages = {}
    for _, _, tensor in named_tensors(model):
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
