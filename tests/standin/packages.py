# SPDX-License-Identifier: Apache-2.0
"""Packages that only a GPU machine has, and the two ways in which SGLang gets at its own kernels.

Kernels come from the package ``sgl_kernel``, or, more of them in each release, are compiled when first used, by
``load_jit``. Either way it is :mod:`standin.kernels` that answers, below SGLang's own Python.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from standin import kernels

ABSENT = ("sgl_kernel", "cutlass", "cuda")
"""Top-level packages to answer for, where they are not installed."""

JIT = ("sglang.jit_kernel.utils", "sglang.kernels.jit.utils.compile.loader", "sglang.kernels.jit.utils")
"""Modules that define or hand on ``load_jit``, in the releases that have them."""


def install() -> None:
    """From now on, imports of these packages succeed, and ``load_jit`` compiles nothing."""
    sys.meta_path.append(_Absent())
    sys.meta_path.insert(0, _Changed(dict.fromkeys(JIT, _without_compiler)))


class Missing:
    """Something of a package that is not there: may be imported, subclassed or used to decorate, but not called."""

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

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        known = fullname.partition(".")[0] in ABSENT
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


def load_jit(*args: str, cuda_wrappers: Sequence[tuple[str, str]] = (), **_how: Any) -> Any:
    """A module with the emulations of the functions that SGLang would compile.

    ``args`` name the module and the template's arguments, ``cuda_wrappers`` its functions and what they instantiate.
    """
    found = {}
    for exported, instantiated in cuda_wrappers:
        emulated = kernels.BY_NAME.get(exported)
        found[exported] = emulated or Missing(f"{exported} ({instantiated})")
    return types.SimpleNamespace(**found)
