# SPDX-License-Identifier: Apache-2.0
"""How SGLang is patched: each hook is a piece of data, checked against the installed SGLang before it is applied.

SGLang's ``HookRegistry`` has no part in it: its public ``apply_hooks`` would apply what all other plugins have
registered too, while SGLang is still being imported, and applying only some of it takes private attributes.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any


class HookKind(enum.Enum):
    """How a hook relates to the original. It is called with the arguments, and before them

    after: with the original's result, for which it may return another;
    around: with the original, which it may call;
    replace: with nothing.
    """

    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class State(str, enum.Enum):
    """What became of a hook in this process."""

    READY = "ready"
    ABSENT = "absent"
    MISSING = "missing"
    SIGNATURE = "signature"
    ACTIVE = "active"

    @property
    def fits(self) -> bool:
        """Whether streaming can do with it, perhaps less of it."""
        return self not in (State.MISSING, State.SIGNATURE)


@dataclass(frozen=True)
class Place:
    """Where other releases have what a hook patches.

    Attributes:
        target: as of the hook.
        wrapper: as of the hook; None where it is the same one.
        parameters: as of the hook; None where they are the same.
    """

    target: str
    wrapper: str | None = None
    parameters: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BuiltIn:
    """What stands at a hook in an SGLang that streams by itself, where the patch series has been applied.

    Attributes:
        patch: number of the patch, from 1, that puts it there.
        wrapper: ``module:function`` of the package that the series adds.
    """

    patch: int
    wrapper: str


@dataclass(frozen=True)
class Hook:
    """One place where SGLang is patched.

    Attributes:
        target: dotted name of the function or method patched.
        wrapper: ``module:function`` of this package put there.
        kind: how the hook relates to the original.
        parameters: names the target's parameters must have, in this order (others may stand between).
        why: what the patch is for.
        related: upstream issues and pull requests.
        remove_when: what must happen upstream for the entry to be deleted.
        elsewhere: where releases have it that do not have it at ``target``.
        without: what is lost with a release that has nothing of the kind; empty where streaming cannot do without.
        built_in: what the patch series has there instead, one patch after the other; empty where it has nothing.
    """

    target: str
    wrapper: str
    kind: HookKind
    parameters: tuple[str, ...]
    why: str
    related: tuple[str, ...]
    remove_when: str
    elsewhere: tuple[Place, ...] = ()
    without: str = ""
    built_in: tuple[BuiltIn, ...] = ()

    @property
    def candidates(self) -> tuple[Hook, ...]:
        """The hook at each of its places, the newest release's first."""
        others = (
            replace(
                self,
                target=place.target,
                wrapper=place.wrapper or self.wrapper,
                parameters=self.parameters if place.parameters is None else place.parameters,
                elsewhere=(),
            )
            for place in self.elsewhere
        )
        return (replace(self, elsewhere=()), *others)

    @property
    def module(self) -> str:
        """Name of the module that defines the target."""
        return module_of(self.target)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules that may define the target, each once."""
        return tuple(dict.fromkeys(candidate.module for candidate in self.candidates))


def module_of(target: str) -> str:
    """The module's part of a dotted name: classes begin with a capital, modules do not."""
    parts = target.split(".")[:-1]
    while parts[-1].lstrip("_")[0].isupper():
        parts.pop()
    return ".".join(parts)


@dataclass(frozen=True)
class HookState:
    """A hook, at the place where it was found, and what was found there."""

    hook: Hook
    state: State
    detail: str = ""


def inspect_hook(hook: Hook) -> HookState:
    """Look at the target in the installed SGLang, wherever that has it; imports the modules that may define it."""
    errors = []
    for candidate in hook.candidates:
        try:
            target = pkgutil.resolve_name(candidate.target)
        except (ImportError, AttributeError, ValueError) as error:
            errors.append(f"{type(error).__name__}: {error}")
            continue
        return _inspect_target(candidate, target)
    if hook.without:
        return HookState(hook, State.ABSENT, hook.without)
    return HookState(hook, State.MISSING, "; ".join(errors))


def _inspect_target(hook: Hook, target: Any) -> HookState:
    try:
        taken = _taken_by_wrapper(hook)
    except Exception as error:  # Something that it imports is not where it was.
        return HookState(hook, State.MISSING, f"its hook cannot be imported: {type(error).__name__}: {error}")
    problem = why_not_called(hook, list(inspect.signature(target).parameters), taken)
    if problem:
        return HookState(hook, State.SIGNATURE, problem)
    is_active = hook.target in _applied and _is_called(hook.target)
    return HookState(hook, State.ACTIVE if is_active else State.READY)


def inspect_hooks(hooks: Iterable[Hook]) -> list[HookState]:
    """``inspect_hook`` for each, in order."""
    return [inspect_hook(hook) for hook in hooks]


def apply(hooks: Iterable[Hook]) -> str | None:
    """Put hooks in place: all of them, or none where one would not fit. Those that are in place stay as they are.

    Returns:
        What is not as expected, or None.
    """
    found = inspect_hooks(hooks)
    broken = [state for state in found if not state.state.fits]
    if broken:
        from sglang_overlay.hooks import releases

        supported = ", ".join(releases.supported())
        return f"SGLang {releases.installed()} is not as expected: {listed(broken)}; supported releases: {supported}"
    _put_on(found)
    return None


def apply_fitting(hooks: Iterable[Hook]) -> None:
    """Put hooks in place, those whose targets are as expected."""
    _put_on(inspect_hooks(hooks))


def _put_on(found: Iterable[HookState]) -> None:
    for state in found:
        if state.state is State.READY:
            _applied[state.hook.target] = hooked = _hooked(state.hook)
            hooked.put_on()


def displaced(hooks: Iterable[Hook]) -> list[str]:
    """Targets whose hooks were in place, and are called no more: another plugin has replaced function or class."""
    targets = dict.fromkeys(candidate.target for hook in hooks for candidate in hook.candidates)
    return [target for target in targets if target in _applied and not _is_called(target)]


@contextlib.contextmanager
def lifted(hooks: Iterable[Hook]) -> Iterator[None]:
    """Stock SGLang for a while: hooks that are in place are taken off, and put on again at the end."""
    targets = dict.fromkeys(candidate.target for hook in hooks for candidate in hook.candidates)
    taken = [_applied[target] for target in targets if target in _applied]
    for hooked in taken:
        hooked.take_off()
    try:
        yield
    finally:
        for hooked in taken:
            hooked.put_on()


@dataclass(frozen=True)
class _Hooked:
    """A function of SGLang's and what stands for it.

    Attributes:
        owner: module or class.
        name: there.
        own: whether the owner itself has it; a class may have inherited it.
        before: as the owner has it, a ``staticmethod`` for example.
        after: the same with the hook.
    """

    owner: Any
    name: str
    own: bool
    before: Any
    after: Any

    def put_on(self) -> None:
        setattr(self.owner, self.name, self.after)
        if isinstance(self.owner, ModuleType):
            _rebind(self.before, self.after)

    def take_off(self) -> None:
        if self.own:
            setattr(self.owner, self.name, self.before)
        else:
            delattr(self.owner, self.name)
        if isinstance(self.owner, ModuleType):
            _rebind(self.after, self.before)


_applied: dict[str, _Hooked] = {}


def _hooked(hook: Hook) -> _Hooked:
    owner_name, _, name = hook.target.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    before = inspect.getattr_static(owner, name)
    function = _wrapped(_function(before), _wrapper_of(hook), hook.kind)
    after = type(before)(function) if isinstance(before, (classmethod, staticmethod)) else function
    return _Hooked(owner, name, name in vars(owner), before, after)


def _function(attribute: Any) -> Callable[..., Any]:
    """The function of a ``staticmethod``, a ``classmethod`` or a bound method; others are one."""
    function: Callable[..., Any] = getattr(attribute, "__func__", attribute)
    return function


def _wrapped(original: Callable[..., Any], wrapper: Callable[..., Any], kind: HookKind) -> Callable[..., Any]:
    @functools.wraps(original)
    def around(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    @functools.wraps(original)
    def after(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        changed = wrapper(result, *args, **kwargs)
        return result if changed is None else changed

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(*args, **kwargs)

    return {HookKind.AROUND: around, HookKind.AFTER: after, HookKind.REPLACE: replacement}[kind]


def _rebind(old: Any, new: Any) -> None:
    """Change it where modules of SGLang's have imported it by name, too."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "sglang"]
    for module in filter(None, modules):
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


def _is_called(target: str) -> bool:
    """Whether who calls the target gets to its hook, through wrappers of other plugins if need be."""
    try:
        function = _function(pkgutil.resolve_name(target))
    except (ImportError, AttributeError):
        return False
    wrapper = _function(_applied[target].after)
    while function is not wrapper:
        inner = getattr(function, "__wrapped__", None)
        # What replaces a function may name it as the one it wraps, but does not hold it.
        if inner is None or (type(function) is FunctionType and not _holds(function, inner)):
            return False
        function = inner
    return True


def _holds(function: FunctionType, value: Any) -> bool:
    return any(cell.cell_contents is value for cell in function.__closure__ or ())


def by_module(hooks: Iterable[Hook]) -> dict[str, tuple[Hook, ...]]:
    """Points by the names of the modules that may define their targets."""
    found: dict[str, tuple[Hook, ...]] = {}
    for hook in hooks:
        for module in hook.modules:
            found[module] = (*found.get(module, ()), hook)
    return found


def listed(states: Iterable[HookState]) -> str:
    """States for a message."""
    return "; ".join(f"{found.hook.target}: {found.state.value} ({found.detail})" for found in states)


def in_order(expected: Sequence[str], names: Sequence[str]) -> bool:
    """Whether ``expected`` are among ``names``, in this order."""
    remaining = iter(names)
    return all(name in remaining for name in expected)


def why_not_called(hook: Hook, names: Sequence[str], taken: int | None) -> str:
    """Why a hook cannot stand for its target; empty where it can.

    Args:
        hook: says what the target must take.
        names: the target's parameters.
        taken: how many the hook has, the original itself included; None where it takes any.
    """
    if not in_order(hook.parameters, names):
        return f"expected {', '.join(hook.parameters)}; found {', '.join(names)}"
    if hook.kind is HookKind.AROUND and taken is not None and len(names) > taken - 1:
        return f"found {', '.join(names)}, more than its hook passes on"
    return ""


def _taken_by_wrapper(hook: Hook) -> int | None:
    parameters = inspect.signature(_wrapper_of(hook)).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return None if takes_any else len(parameters)


def _wrapper_of(hook: Hook) -> Callable[..., Any]:
    module, _, name = hook.wrapper.partition(":")
    wrapper: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return wrapper
