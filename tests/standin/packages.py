# SPDX-License-Identifier: Apache-2.0
"""Packages that only a GPU machine has, and the two ways in which SGLang gets at its own kernels.

Kernels come from the package ``sgl_kernel``, or, more of them in each release, are compiled when first used, by
``load_jit``. Either way it is :mod:`standin.kernels` that answers, below SGLang's own Python.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from standin import kernels, libraries  # noqa: F401 - libraries enters its own into kernels
from standin.gpus import PACKAGES_VARIABLE as VARIABLE

ABSENT = (
    *("sgl_kernel", "cutlass", "quack", "cuda", "triton_kernels"),
    *filter(None, os.environ.get(VARIABLE, "").split(",")),
)
"""Top-level packages to answer for, where they are not installed: those of every GPU machine, and what is asked for."""

JIT = ("sglang.jit_kernel.utils", "sglang.kernels.jit.utils.compile.loader", "sglang.kernels.jit.utils")
"""Modules that define or hand on ``load_jit``, in the releases that have them."""


def install() -> None:
    """From now on, imports of these packages succeed, and ``load_jit`` compiles nothing."""
    answer_for(*ABSENT)
    # Old releases describe operators of sgl_kernel to torch.compile, which are not there.
    torch.library.register_fake = _without_those_absent(torch.library.register_fake)
    changes = {**dict.fromkeys(JIT, _without_compiler), "sglang.srt.utils.common": _without_kernel_cache}
    sys.meta_path.insert(0, _Changed(changes))


def _without_those_absent(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def register_fake(op: Any, *args: Any, **how: Any) -> Any:
        namespace, _, name = str(op).partition("::")
        if namespace in ABSENT and not hasattr(getattr(torch.ops, namespace), name):
            return (lambda function: function) if not args else args[0]
        return original(op, *args, **how)

    return register_fake


def answer_for(*names: str) -> None:
    """From now on, imports of these top-level packages succeed where they are not installed."""
    sys.meta_path.append(_Absent(names))


class Missing:
    """Something of a package that is not there: may be imported, a base, a type or a decorator, but not called."""

    __iter__ = None

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and callable(args[0]):
            return args[0]
        raise NotImplementedError(f"the stand-in GPU has no {self._name}: emulate it in tests/standin/kernels.py")

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self._name}.{name}")

    def __getitem__(self, parameters: Any) -> Missing:
        return self

    def __or__(self, other: Any) -> Missing:
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)


class _AbsentModule(types.ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return kernels.BY_NAME.get(name) or Missing(f"{self.__name__}.{name}")


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on the path, so that what is installed wins."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = fullname.partition(".")[0] in self._names
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if known else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Calls a function with a module right after it has run."""

    def __init__(self, changes: dict[str, Callable[[types.ModuleType], None]]) -> None:
        self._changes = changes
        self._loaders: dict[str, Any] = {}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._changes or fullname in self._loaders:
            return None
        self._loaders[fullname] = None
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            self._loaders[fullname], spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        found: types.ModuleType | None = self._loaders[spec.name].create_module(spec)
        return found

    def exec_module(self, module: types.ModuleType) -> None:
        self._loaders[module.__name__].exec_module(module)
        self._changes[module.__name__](module)


def _without_compiler(module: types.ModuleType) -> None:
    if hasattr(module, "load_jit"):
        module.load_jit = load_jit  # type: ignore[attr-defined]


def _without_kernel_cache(module: types.ModuleType) -> None:
    # Its cache of compiled Triton kernels takes no interpreted ones.
    if hasattr(module, "cached_triton_kernel"):
        module.cached_triton_kernel = lambda _key: lambda function: function  # type: ignore[attr-defined]


def load_jit(*args: str, cuda_wrappers: Sequence[tuple[str, str]] = (), **_how: Any) -> Any:
    """A module with the emulations of the functions that SGLang would compile.

    ``args`` name the module and the template's arguments, ``cuda_wrappers`` its functions and what they instantiate.
    """
    found = {}
    for exported, instantiated in cuda_wrappers:
        # A template's variant, where it is one that does something else.
        variant = instantiated.partition(",")[0]
        emulated = kernels.BY_NAME.get(variant) or kernels.BY_NAME.get(exported)
        found[exported] = emulated or Missing(f"{exported} ({instantiated})")
    return types.SimpleNamespace(**found)
