# SPDX-License-Identifier: Apache-2.0
"""torch's operators for CUDA, run on the CPU on the same memory.

Registered with torch's dispatcher in place of the CUDA kernels, so whatever reaches a GPU through torch comes by here,
from any thread. Metadata only (views, allocation) stays torch's own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

OWN = frozenset(
    {
        *("as_strided", "view", "_reshape_alias", "unfold", "view_as_real", "view_as_complex", "_lazy_clone"),
        *("empty", "empty_strided", "set_", "is_set_to", "resize_", "_resize_output_", "_nested_view_from_buffer"),
        *("record_stream", "is_pinned", "_pin_memory"),
    }
)
"""Operators that launch nothing and stay torch's own."""

MIXING = frozenset({"copy_", "_index_put_impl_", "index", "index_put_", "_local_scalar_dense"})
"""Operators that take host memory beside the device's; others want all but scalars on one device."""


class Operations:
    """Counts what would be launched on the device, by name. ``_lock`` guards the counter and the threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: Counter[str] = Counter()
        self._threads: dict[str, str] = {}

    def note(self, name: str) -> None:
        """One more of these."""
        with self._lock:
            self._found[name] += 1
            self._threads.setdefault(name, threading.current_thread().name)

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """What comes meanwhile, in all threads; complete when the block ends."""
        with self._lock:
            before = self._found.copy()
        found: Counter[str] = Counter()
        yield found
        with self._lock:
            found.update(self._found - before)

    @contextmanager
    def first_uses(self) -> Iterator[dict[str, str]]:
        """The thread that was first with each, meanwhile; complete when the block ends."""
        with self._lock:
            self._threads.clear()
        found: dict[str, str] = {}
        yield found
        with self._lock:
            found.update(self._threads)


OPERATIONS = Operations()


def counted() -> AbstractContextManager[Counter[str]]:
    """A recorder of :class:`workbench.loads.job.LoadJob`."""
    return OPERATIONS.counted()


def first_uses() -> AbstractContextManager[dict[str, str]]:
    """A recorder of :class:`workbench.loads.job.LoadJob`."""
    return OPERATIONS.first_uses()


HOST_TO_DEVICE, DEVICE_TO_HOST = "host to device", "device to host"
"""Names under which copies between the two are counted as well; the latter are waited for."""
_libraries: list[torch.library.Library] = []


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, strides and offset as a CPU tensor."""
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
    host = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), torch.device("cpu"), storage.nbytes())
    flat = torch.empty(0, dtype=tensor.dtype, device="cpu")
    return flat.set_(host, tensor.storage_offset(), tensor.shape, tensor.stride())


def install() -> None:
    """Take the place of every CUDA kernel of torch's own operators."""
    library = torch.library.Library("aten", "IMPL")
    # copy_ has one kernel for all devices, which would launch another to cast.
    names = {*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), "aten::copy_"}
    for name in sorted(names):
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        operator = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if namespace == "aten" and base not in OWN and operator is not None:
            library.impl(rest, _run_on_host(operator, base), "CUDA")
    _libraries.append(library)


class _Call:
    """One operator's call: lays tensors out on the host, and takes results back to the device."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._given: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._devices: dict[torch.device, None] = {}
        self._first: torch.Tensor | None = None
        self._host: list[torch.Tensor] = []

    @property
    def _written_on_host(self) -> bool:
        """Of a copy: its first tensor is where it goes."""
        return bool(self._host) and self._host[0] is self._first

    def down(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.down, value)) if not hasattr(value, "_fields") else value
        if isinstance(value, torch.device) and value.type == "cuda":
            self._devices[_indexed(value)] = None
            return torch.device("cpu")
        if not isinstance(value, torch.Tensor):
            return value
        self._first = value if self._first is None else self._first
        if value.device.type != "cuda":
            self._host.append(value)
            return value
        self._devices[value.device] = None
        host = on_host(value)
        self._given.append((host, value))
        return host

    def check(self) -> None:
        """As torch does.

        Raises:
            RuntimeError: the tensors are on several devices.
        """
        apart = [one for one in self._host if one.dim() or one.numel() != 1]
        if self._name not in MIXING and (len(self._devices) > 1 or apart):
            found = [str(device) for device in self._devices] + [str(one.device) for one in apart]
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} ({self._name})")

    def note_transfer(self) -> None:
        """Count what crosses between host and device."""
        if self._name == "_local_scalar_dense" or (self._name == "copy_" and self._written_on_host):
            OPERATIONS.note(DEVICE_TO_HOST)
        elif self._name == "copy_" and self._host:
            OPERATIONS.note(HOST_TO_DEVICE)

    def up(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self.up, value)) if not hasattr(value, "_fields") else tuple(map(self.up, value))
        if not isinstance(value, torch.Tensor):
            return value
        for host, original in self._given:
            if host is value:
                return _resized(original, host)
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=next(iter(self._devices)))
        on_host(made).copy_(value)
        return made


def _run_on_host(operator: Any, name: str) -> Callable[..., Any]:
    label = operator.name()
    tensors = [argument.type.kind() == "TensorType" for argument in operator._schema.arguments]

    def run(*args: Any, **kwargs: Any) -> Any:
        call = _Call(name)
        # The dispatcher hands on a number that stands for a tensor as a number, which not every operator takes.
        args = tuple(_as_tensor(value) if wanted else value for value, wanted in zip(args, tensors, strict=False))
        laid_out = [call.down(value) for value in args], {key: call.down(value) for key, value in kwargs.items()}
        call.check()
        OPERATIONS.note(label)
        call.note_transfer()
        return call.up(operator(*laid_out[0], **laid_out[1]))

    return run


def _as_tensor(value: Any) -> Any:
    # A float would bring a dtype of its own, that of the process's default, into the result.
    return torch.tensor(value, device="cpu") if isinstance(value, (bool, int)) else value


def _resized(original: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    """``original``, which an ``out=`` operator may have given another shape on the host."""
    if host.shape != original.shape:
        original.resize_(host.shape)
        on_host(original).copy_(host)
    return original


def _indexed(device: torch.device) -> torch.device:
    return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
