# SPDX-License-Identifier: Apache-2.0
"""Is streaming active in the processes SGLang starts from this environment? Answered by doing what they do.

SGLang logs and swallows all exceptions of plugins, so an installed plugin may still be inactive. Here
``load_plugins()`` runs in this process, and then every hook is inspected.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import warnings
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from sglang_overlay import __version__, settings
from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.hooks import built_in, compatibility, hook, releases

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from sglang_overlay.hooks.hook import Hook, HookState

SCHEMA = "sglang-streamfp8/check"
VERSION = 1
NOTES = (
    "Ray's scheduler actors (--use-ray) load no plugins: give the Ray job the runtime environment "
    '{"worker_process_setup_hook": "sglang.srt.plugins.load_plugins"}',
    "sglang.benchmark.one_batch (sglang.bench_one_batch before 0.5.15), and the ranks of an encoder server "
    "(sglang.launch_server --encoder-only with --tp-size or --dp-size) load no plugins: start each as "
    "python -m sglang_overlay run <module> <arguments>",
)
"""Ways to start SGLang in which streaming is not active, whatever the result of this check."""

PLUGIN_GROUP = "sglang.srt.plugins"
PLUGIN_NAME = "streamfp8"
PLATFORM_NAME = "streamfp8_cpu"
_WATCHED_LOGGERS = ("sglang.srt.plugins", "sglang_overlay")


@dataclass(frozen=True)
class HookLine:
    """One hook and its state in this process ('ready' means it fits but is not applied)."""

    target: str
    kind: str
    state: str
    detail: str
    why: str
    related: tuple[str, ...]
    remove_when: str


@dataclass(frozen=True)
class Activation:
    """The result of the check.

    Attributes:
        problems: what keeps streaming from being active, each with the next step to take.
        notes: where streaming has to be switched on by hand.
    """

    release: str | None
    supported: tuple[str, ...]
    mode: str | None
    report_folder: str | None
    streaming: tuple[HookLine, ...]
    cpu_reference: tuple[HookLine, ...]
    options: tuple[HookLine, ...]
    telling: tuple[HookLine, ...]
    problems: tuple[str, ...]
    messages: tuple[str, ...]
    notes: tuple[str, ...] = NOTES
    overlay_version: str = __version__

    @property
    def active(self) -> bool:
        """Whether an fp8 load in this environment would be streamed."""
        return not self.problems


def to_json(found: Activation) -> dict[str, Any]:
    """``found`` as plain JSON data, with schema name, version and the verdict first."""
    return {"schema": SCHEMA, "version": VERSION, "active": found.active, **asdict(found)}


def inspect_activation(environ: Mapping[str, str]) -> Activation:
    """Load SGLang's plugins as a server would, and report each hook's state. Imports SGLang, which takes seconds."""
    mode, folder, problems = _read_settings(environ)
    problems += _installation_problems(environ)
    hooks = _Hooks()
    messages: list[str] = []
    # With an invalid setting the plugin refuses to start, so there is nothing to look at yet.
    if mode is not None and importlib.util.find_spec("sglang") is not None:
        # What SGLang prints while it is imported must not end up in the output of --json.
        with contextlib.redirect_stdout(sys.stderr), _heard(messages):
            problems += _load_plugins() or _platform_problems()
            hooks = _hooks()
    if not problems:
        problems += _hook_problems(hooks.streaming, messages)
    untested = compatibility.untested_note()
    if untested is not None and mode == settings.Mode.REQUIRE.value:
        problems.append(f"{untested} {settings.MODE_VARIABLE}={mode} refuses that; =1 streams all the same")
    return Activation(
        release=releases.installed(),
        supported=releases.supported(),
        mode=mode,
        report_folder=folder,
        streaming=hooks.streaming,
        cpu_reference=hooks.cpu_reference,
        options=hooks.options,
        telling=hooks.telling,
        problems=tuple(problems),
        messages=tuple(messages),
        notes=(*_notes(untested if not problems else None), *NOTES),
    )


def _notes(untested: str | None) -> Iterator[str]:
    if built_in.streams_itself():
        yield f"{built_in.NOTE[:1].upper()}{built_in.NOTE[1:]}."
    if untested is not None:
        yield untested


def _read_settings(environ: Mapping[str, str]) -> tuple[str | None, str | None, list[str]]:
    try:
        found = settings.load_settings(environ)
    except StreamFP8Error as error:
        return None, None, [str(error)]
    folder = None if found.report_folder is None else str(found.report_folder)
    if found.mode is settings.Mode.OFF:
        off = f"{settings.MODE_VARIABLE}=0 switches streaming off; unset it, or set it to 1"
        return found.mode.value, folder, [off]
    return found.mode.value, folder, []


def _installation_problems(environ: Mapping[str, str]) -> list[str]:
    if releases.installed() is None:
        return [f"SGLang is not installed for {sys.executable}; run: pip install sglang"]
    problems = []
    reason = compatibility.unsupported_reason()
    if reason is not None:
        problems.append(f"{reason}; install one of those, or a newer sglang-streamfp8")
    if PLUGIN_NAME not in metadata.entry_points(group=PLUGIN_GROUP).names:
        problems.append(
            f"no entry point {PLUGIN_NAME!r} in {PLUGIN_GROUP}, so SGLang does not know this plugin; run: "
            f"{sys.executable} -m pip install . (in a clone of this package)"
        )
    allowed = [name.strip() for name in environ.get("SGLANG_PLUGINS", "").split(",") if name.strip()]
    if allowed and PLUGIN_NAME not in allowed:
        problems.append(
            f"SGLANG_PLUGINS={','.join(allowed)} leaves {PLUGIN_NAME!r} out; unset it, or set "
            f"SGLANG_PLUGINS={','.join([*allowed, PLUGIN_NAME])}"
        )
    platform = environ.get("SGLANG_PLATFORM", "")
    if platform not in ("", PLATFORM_NAME):
        problems.append(
            f"SGLANG_PLATFORM={platform} leaves {PLUGIN_NAME!r} out: SGLang skips all plugins of packages that offer "
            f"another platform, and this one offers {PLATFORM_NAME!r}; unset it"
        )
    return problems


def _load_plugins() -> list[str]:
    try:
        from sglang.srt.plugins import load_plugins

        load_plugins()
    except SystemExit as refusal:
        # This package's plugin stops a server like this, since SGLang swallows exceptions. It says what to do.
        return [str(refusal)]
    except Exception as error:
        return [f"SGLang's plugins could not be loaded: {type(error).__name__}: {error}; see that SGLang itself starts"]
    return []


def _platform_problems() -> list[str]:
    from sglang.srt.utils import get_device

    from sglang_overlay.load import eligibility

    reason = eligibility.why_not_platform()
    if reason is not None:
        return [f"{reason}: fp8 loads are stock's here. CUDA and ROCm are covered, and the CPU reference"]
    try:
        get_device()
    except RuntimeError as error:
        return [f"{error} {settings.CPU_REFERENCE_VARIABLE}=1 has SGLang serve on the CPU, for a trial"]
    return []


@dataclass(frozen=True)
class _Hooks:
    """All hooks, by what they are for."""

    streaming: tuple[HookLine, ...] = ()
    cpu_reference: tuple[HookLine, ...] = ()
    options: tuple[HookLine, ...] = ()
    telling: tuple[HookLine, ...] = ()


def _hooks() -> _Hooks:
    from sglang_overlay.cpu_reference import catalogue as cpu_reference
    from sglang_overlay.hooks import catalogue as upstream

    return _Hooks(
        streaming=_states(upstream.STREAMING),
        cpu_reference=_states(cpu_reference.HOOKS),
        options=_states(upstream.OPTIONS),
        telling=_states(upstream.TELLING),
    )


def _states(hooks: Iterable[Hook]) -> tuple[HookLine, ...]:
    return tuple(_hook(found) for found in hook.inspect_hooks(hooks))


def _hook(found: HookState) -> HookLine:
    hook = found.hook
    return HookLine(
        target=hook.target,
        kind=hook.kind.value,
        state=found.state.value,
        detail=found.detail,
        why=hook.why,
        related=hook.related,
        remove_when=hook.remove_when,
    )


def _hook_problems(hooks: Sequence[HookLine], messages: Sequence[str]) -> list[str]:
    """One problem for all hooks that are not applied: usually they have one cause."""
    placed = (hook.State.ACTIVE.value, hook.State.ABSENT.value)
    idle = [hook for hook in hooks if hook.state not in placed]
    if not idle:
        return []
    unfit = [f"{hook.target}: {hook.state}, {hook.detail}" for hook in idle if hook.detail]
    cause = "; ".join([*unfit, *messages]) or "SGLang's log at level INFO names the plugins it loads"
    return [f"{len(idle)} of {len(hooks)} hooks are not applied; {cause}"]


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        cause = record.exc_info[1] if record.exc_info else None
        suffix = f": {type(cause).__name__}: {cause}" if cause is not None else ""
        self._messages.append(f"{record.levelname}: {record.getMessage()}{suffix}")


@contextlib.contextmanager
def _heard(messages: list[str]) -> Iterator[None]:
    """Collect warnings of the plugin system and of this package instead of printing them to standard error.

    Other warnings while SGLang is imported, such as about kernels for other machines, are irrelevant here.
    """
    handler = _Collector(messages)
    loggers = [logging.getLogger(name) for name in _WATCHED_LOGGERS]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate
