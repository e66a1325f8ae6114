# SPDX-License-Identifier: Apache-2.0
"""How SGLang is patched: each patch is a piece of data, checked against the installed SGLang before it is applied.

SGLang's own ``HookRegistry`` (``sglang/srt/plugins/hook_registry.py``) does the patching. It swallows exceptions, so
everything that can go wrong is looked for here first.
"""

from __future__ import annotations

import enum
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


class HookKind(enum.Enum):
    """SGLang's hook types, by the values of its own ``HookType``."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


class State(str, enum.Enum):
    """What became of a touch point in this process."""

    READY = "ready"
    MISSING = "missing"
    SIGNATURE = "signature"
    ACTIVE = "active"


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
    """

    target: str
    hook: str
    kind: HookKind
    parameters: tuple[str, ...]
    why: str
    related: tuple[str, ...]
    remove_when: str

    @property
    def module(self) -> str:
        """Name of the module that defines the target."""
        parts = self.target.split(".")[:-1]
        while parts[-1][0].isupper():
            parts.pop()
        return ".".join(parts)


@dataclass(frozen=True)
class PointState:
    """A touch point and what was found where it points."""

    point: TouchPoint
    state: State
    detail: str = ""


def inspect_point(point: TouchPoint) -> PointState:
    """Look at the target in the installed SGLang; imports the module that defines it."""
    try:
        target = pkgutil.resolve_name(point.target)
    except (ImportError, AttributeError, ValueError) as error:
        return PointState(point, State.MISSING, f"{type(error).__name__}: {error}")
    names = list(inspect.signature(target).parameters)
    if not _in_order(point.parameters, names):
        return PointState(point, State.SIGNATURE, f"expected {', '.join(point.parameters)}; found {', '.join(names)}")
    if _is_applied(point):
        return PointState(point, State.ACTIVE)
    return PointState(point, State.READY)


def inspect_points(points: Iterable[TouchPoint]) -> list[PointState]:
    """``inspect_point`` for each, in order."""
    return [inspect_point(point) for point in points]


def register(points: Iterable[TouchPoint]) -> list[PointState]:
    """Register those hooks whose targets are as expected with SGLang's registry.

    The registry applies them when ``load_plugins()`` ends. Registering one twice changes nothing.

    Returns:
        The states of all points found before registering; the caller decides what a mismatch means.
    """
    states = inspect_points(points)
    for found in states:
        if found.state is State.READY and not _is_registered(found.point):
            _registry().register(found.point.target, _hook(found.point), _hook_type(found.point), source=_source())
    return states


def apply(points: Iterable[TouchPoint]) -> str | None:
    """Register hooks and apply them now, all of them or none.

    Returns:
        What is not as expected, or None.
    """
    found = inspect_points(points)
    broken = [state for state in found if state.state in (State.MISSING, State.SIGNATURE)]
    if broken:
        from sglang_overlay.upstream import releases

        listed = "; ".join(f"{state.point.target}: {state.state.value} ({state.detail})" for state in broken)
        supported = ", ".join(releases.supported())
        return f"SGLang {releases.installed()} is not as expected: {listed}; supported releases: {supported}"
    register(state.point for state in found)
    _registry().apply_hooks()
    return None


def _in_order(expected: tuple[str, ...], names: list[str]) -> bool:
    remaining = iter(names)
    return all(name in remaining for name in expected)


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
