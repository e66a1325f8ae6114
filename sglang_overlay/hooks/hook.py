# SPDX-License-Identifier: Apache-2.0
"""How SGLang is patched: each hook is data, and is checked against the installed SGLang before it is applied.

SGLang's ``HookRegistry`` is not used: its public ``apply_hooks`` would also apply the hooks of all other plugins, while
SGLang is still being imported, and applying only some hooks needs its private attributes.
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
    """How a hook relates to the original. It gets the original's arguments, and before them

    after: the original's result, which it may replace by returning another;
    around: the original function, which it may call;
    replace: nothing.
    """

    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class State(str, enum.Enum):
    """The state of a hook in this process."""

    READY = "ready"
    ABSENT = "absent"
    MISSING = "missing"
    SIGNATURE = "signature"
    ACTIVE = "active"

    @property
    def fits(self) -> bool:
        """Whether streaming works with it, possibly without some features."""
        return self not in (State.MISSING, State.SIGNATURE)


@dataclass(frozen=True)
class Place:
    """Where other releases have the function that a hook patches.

    Attributes:
        target: as in the hook.
        wrapper: as in the hook; None if it is the same.
        parameters: as in the hook; None if they are the same.
    """

    target: str
    wrapper: str | None = None
    parameters: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Hook:
    """One place where SGLang is patched.

    Attributes:
        target: dotted name of the function or method patched.
        wrapper: ``module:function`` of this package that is put there.
        kind: how the hook relates to the original.
        parameters: names the target's parameters must have, in this order (others may stand between).
        why: what the patch is for.
        related: upstream issues and pull requests.
        remove_when: what must happen upstream for the entry to be deleted.
        elsewhere: other places, in releases that do not have it at ``target``.
        without: what is lost with a release that has no such function; empty if streaming is impossible without it.
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

    @property
    def candidates(self) -> tuple[Hook, ...]:
        """One hook for each of its places, the newest release's first."""
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
    """The module in a dotted name: classes begin with a capital, modules do not."""
    parts = target.split(".")[:-1]
    while parts[-1].lstrip("_")[0].isupper():
        parts.pop()
    return ".".join(parts)


@dataclass(frozen=True)
class HookState:
    """A hook, at the place where its target was found, and its state."""

    hook: Hook
    state: State
    detail: str = ""


def inspect_hook(hook: Hook) -> HookState:
    """Inspect a hook's target in the installed SGLang, at any of its places. Imports the modules that may define it."""
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
    except Exception as error:  # Something that it imports has moved.
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
    """Put hooks in place: all of them, or none if one does not fit. Hooks already in place stay.

    Returns:
        A message about what does not fit, or None.
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
    """Put those hooks in place whose targets fit."""
    _put_on(inspect_hooks(hooks))


def _put_on(found: Iterable[HookState]) -> None:
    for state in found:
        if state.state is State.READY:
            _applied[state.hook.target] = hooked = _hooked(state.hook)
            hooked.put_on()


def displaced(hooks: Iterable[Hook]) -> list[str]:
    """Targets whose hooks are no longer called, since another plugin has replaced the function or its class."""
    targets = dict.fromkeys(candidate.target for hook in hooks for candidate in hook.candidates)
    return [target for target in targets if target in _applied and not _is_called(target)]


@contextlib.contextmanager
def lifted(hooks: Iterable[Hook]) -> Iterator[None]:
    """Context with stock SGLang: takes off the hooks that are in place, and puts them on again at the end."""
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
    """A function of SGLang's and its replacement.

    Attributes:
        owner: its module or class.
        name: its name there.
        own: whether the owner itself defines it; a class may inherit it.
        before: the original attribute, for example a ``staticmethod``.
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
    """The function in a ``staticmethod``, a ``classmethod`` or a bound method; other callables unchanged."""
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
    """Also replace it in modules of SGLang's that have imported it by name."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "sglang"]
    for module in filter(None, modules):
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


def _is_called(target: str) -> bool:
    """Whether calls of the target reach its hook, possibly through wrappers of other plugins."""
    try:
        function = _function(pkgutil.resolve_name(target))
    except (ImportError, AttributeError):
        return False
    wrapper = _function(_applied[target].after)
    while function is not wrapper:
        inner = getattr(function, "__wrapped__", None)
        # A replacement may set __wrapped__ without calling the original; then its closure does not hold it.
        if inner is None or (type(function) is FunctionType and not _holds(function, inner)):
            return False
        function = inner
    return True


def _holds(function: FunctionType, value: Any) -> bool:
    return any(cell.cell_contents is value for cell in function.__closure__ or ())


def by_module(hooks: Iterable[Hook]) -> dict[str, tuple[Hook, ...]]:
    """Hooks by the names of the modules that may define their targets."""
    found: dict[str, tuple[Hook, ...]] = {}
    for hook in hooks:
        for module in hook.modules:
            found[module] = (*found.get(module, ()), hook)
    return found


def listed(states: Iterable[HookState]) -> str:
    """A list of states, for a message."""
    return "; ".join(f"{found.hook.target}: {found.state.value} ({found.detail})" for found in states)


def in_order(expected: Sequence[str], names: Sequence[str]) -> bool:
    """Whether all of ``expected`` are in ``names``, in this order; others may stand between."""
    remaining = iter(names)
    return all(name in remaining for name in expected)


def why_not_called(hook: Hook, names: Sequence[str], taken: int | None) -> str:
    """Why a hook cannot replace its target; empty if it can.

    Args:
        hook: says which parameters the target must have.
        names: the target's parameters.
        taken: number of parameters of the hook's function, including the original; None if it takes any.
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
