# SPDX-License-Identifier: Apache-2.0
"""How SGLang is patched: each patch is a piece of data, checked against the installed SGLang before it is applied.

SGLang's own ``HookRegistry`` (``sglang/srt/plugins/hook_registry.py``) does the patching. It swallows exceptions, so
everything that can go wrong is looked for here first.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

logger = logging.getLogger(__name__)


class HookKind(enum.Enum):
    """SGLang's hook types, by the values of its own ``HookType``."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class State(str, enum.Enum):
    """What became of a touch point in this process."""

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
    """Where other releases have what a touch point patches.

    Attributes:
        target: as of the touch point.
        hook: as of the touch point; None where it is the same one.
        parameters: as of the touch point; None where they are the same.
    """

    target: str
    hook: str | None = None
    parameters: tuple[str, ...] | None = None


@dataclass(frozen=True)
class BuiltIn:
    """What stands at a touch point in an SGLang that streams by itself, where the patch series has been applied.

    Attributes:
        patch: number of the patch, from 1, that puts it there.
        hook: ``module:function`` of the package that the series adds.
    """

    patch: int
    hook: str


@dataclass(frozen=True)
class TouchPoint:
    """One place where SGLang is patched.

    Attributes:
        target: dotted name of the function or method patched.
        hook: ``module:function`` of this package put there.
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
    hook: str
    kind: HookKind
    parameters: tuple[str, ...]
    why: str
    related: tuple[str, ...]
    remove_when: str
    elsewhere: tuple[Place, ...] = ()
    without: str = ""
    built_in: tuple[BuiltIn, ...] = ()

    @property
    def candidates(self) -> tuple[TouchPoint, ...]:
        """The touch point at each of its places, the newest release's first."""
        others = (
            replace(
                self,
                target=place.target,
                hook=place.hook or self.hook,
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
class PointState:
    """A touch point, at the place where it was found, and what was found there."""

    point: TouchPoint
    state: State
    detail: str = ""


def inspect_point(point: TouchPoint) -> PointState:
    """Look at the target in the installed SGLang, wherever that has it; imports the modules that may define it."""
    errors = []
    for candidate in point.candidates:
        try:
            target = pkgutil.resolve_name(candidate.target)
        except (ImportError, AttributeError, ValueError) as error:
            errors.append(f"{type(error).__name__}: {error}")
            continue
        return _inspect_target(candidate, target)
    if point.without:
        return PointState(point, State.ABSENT, point.without)
    return PointState(point, State.MISSING, "; ".join(errors))


def _inspect_target(point: TouchPoint, target: Any) -> PointState:
    problem = why_not_called(point, list(inspect.signature(target).parameters), _taken_by_hook(point))
    if problem:
        return PointState(point, State.SIGNATURE, problem)
    if _is_applied(point):
        return PointState(point, State.ACTIVE)
    return PointState(point, State.READY)


def inspect_points(points: Iterable[TouchPoint]) -> list[PointState]:
    """``inspect_point`` for each, in order."""
    return [inspect_point(point) for point in points]


def register(points: Iterable[TouchPoint]) -> list[PointState]:
    """Register those hooks whose targets are as expected with SGLang's registry.

    They are applied by ``apply_registered``, or when ``load_plugins()`` ends. Registering one twice changes nothing.

    Returns:
        The states of all points found before registering; the caller decides what a mismatch means.
    """
    states = inspect_points(points)
    for found in states:
        if found.state is State.READY and not _is_registered(found.point):
            _registry().register(found.point.target, _hook(found.point), _hook_type(found.point), source=_source())
    return states


def apply(points: Iterable[TouchPoint]) -> str | None:
    """Register hooks and apply them now: all of them, or none where one would not fit.

    Returns:
        What is not as expected, or None.
    """
    found = inspect_points(points)
    broken = [state for state in found if not state.state.fits]
    if broken:
        from sglang_overlay.upstream import releases

        supported = ", ".join(releases.supported())
        return f"SGLang {releases.installed()} is not as expected: {listed(broken)}; supported releases: {supported}"
    wanted = [state.point for state in found if state.state is not State.ABSENT]
    register(wanted)
    apply_registered(point.target for point in wanted)
    left = [point.target for point in wanted if not _is_applied(point)]
    return f"hooks could not be applied, SGLang's log says why: {', '.join(left)}" if left else None


def apply_fitting(points: Iterable[TouchPoint]) -> None:
    """Register hooks and apply them now, those whose targets are as expected."""
    apply_registered(state.point.target for state in register(points))


def apply_registered(targets: Iterable[str]) -> None:
    """Apply what is registered for certain targets, and for the classes they belong to.

    Not all that is registered, as the registry's own ``apply_hooks`` does: this runs while SGLang is being imported,
    and what other plugins patch may be half there.
    """
    registry, wanted = _registry(), tuple(targets)
    pending = {target for target in registry._hooks if target not in registry._patched}
    # A class that another plugin replaces is shorter than its methods, and comes first.
    for target in sorted(pending, key=len):
        if any(f"{name}.".startswith(f"{target}.") for name in wanted):
            _apply_one(registry, target)


def _apply_one(registry: Any, target: str) -> None:
    try:
        registry._apply_target(target, registry._hooks[target])
        registry._patched.add(target)
    except Exception:
        # Most likely another plugin's, since ours have been looked at before: SGLang's import must not fail for it.
        logger.exception("StreamFP8: hooks of %s could not be applied", target)


def by_module(points: Iterable[TouchPoint]) -> dict[str, tuple[TouchPoint, ...]]:
    """Points by the names of the modules that may define their targets."""
    found: dict[str, tuple[TouchPoint, ...]] = {}
    for point in points:
        for module in point.modules:
            found[module] = (*found.get(module, ()), point)
    return found


def listed(states: Iterable[PointState]) -> str:
    """States for a message."""
    return "; ".join(f"{found.point.target}: {found.state.value} ({found.detail})" for found in states)


def in_order(expected: Sequence[str], names: Sequence[str]) -> bool:
    """Whether ``expected`` are among ``names``, in this order."""
    remaining = iter(names)
    return all(name in remaining for name in expected)


def why_not_called(point: TouchPoint, names: Sequence[str], taken: int | None) -> str:
    """Why a hook cannot stand for its target; empty where it can.

    Args:
        point: says what the target must take.
        names: the target's parameters.
        taken: how many the hook has, the original itself included; None where it takes any.
    """
    if not in_order(point.parameters, names):
        return f"expected {', '.join(point.parameters)}; found {', '.join(names)}"
    if point.kind is HookKind.AROUND and taken is not None and len(names) > taken - 1:
        return f"found {', '.join(names)}, more than its hook passes on"
    return ""


def _taken_by_hook(point: TouchPoint) -> int | None:
    parameters = inspect.signature(_hook(point)).parameters.values()
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    return None if takes_any else len(parameters)


def _registry() -> Any:
    from sglang.srt.plugins.hook_registry import HookRegistry

    return HookRegistry


def _hook_type(point: TouchPoint) -> Any:
    from sglang.srt.plugins.hook_registry import HookType

    return HookType(point.kind.value)


def _source() -> Any:
    from sglang.srt.plugins.hook_registry import HookSource

    return HookSource(plugin_name="streamfp8", dist_name="sglang-streamfp8")


def _hook(point: TouchPoint) -> Callable[..., Any]:
    module, _, name = point.hook.partition(":")
    hook: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return hook


def _is_registered(point: TouchPoint) -> bool:
    hook = _hook(point)
    return any(entry[1] is hook for entry in _registry()._hooks.get(point.target, ()))


def _is_applied(point: TouchPoint) -> bool:
    return point.target in _registry()._patched and _is_registered(point)
