# SPDX-License-Identifier: Apache-2.0
"""Which layer gets which scheme: the value of ``SGLANG_STREAMFP8_SCHEME``, or of an option of the server.

A name (``block``) is the scheme of all layers. A JSON object chooses by kind of layer and by name::

    {"linear": "channel", "moe": "block", "ignore": ["lm_head"], "overrides": {"o_proj": "tensor"}}

A pattern is a layer's full name, the end of it after a dot, or ``re:`` and a regular expression that matches the full
name from its start. A fused layer also matches if all checkpoint names of its parts do: ``q_proj``, ``k_proj``,
``v_proj``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sglang_overlay.errors import SettingsError

STOCK = "stock"
NONE = "none"
MXFP8 = "mxfp8"
"""Not a scheme, but a value of SGLang's own ``--quantization`` (``schemes/mxfp8.py``)."""
FLAGS = {"fp8_block": "block", "fp8_channel": "channel", "fp8_tensor": "tensor"}
"""Further values of SGLang's ``--quantization``, and the schemes that they choose."""
_KEYS = ("linear", "moe", "ignore", "overrides")


@dataclass(frozen=True)
class SchemeChoice:
    """Names of schemes, by kind of layer and by pattern.

    Attributes:
        linear: scheme of linear layers.
        moe: scheme of expert layers.
        overrides: schemes by pattern, in the order given; the first pattern that matches counts.
    """

    linear: str = STOCK
    moe: str = STOCK
    overrides: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """All schemes that the user asked for."""
        return {self.linear, self.moe, *self.overrides.values()}

    @property
    def is_stock(self) -> bool:
        """Whether every layer is quantized as in stock SGLang."""
        return self.names == {STOCK}

    @property
    def text(self) -> str:
        """The choice in a few words: ``block``, or ``linear channel, moe block, 1 pattern``."""
        kinds = self.linear if self.linear == self.moe else f"linear {self.linear}, moe {self.moe}"
        if not self.overrides:
            return kinds
        return f"{kinds}, {len(self.overrides)} pattern{'s' if len(self.overrides) > 1 else ''}"

    @property
    def as_json(self) -> str:
        """The choice as JSON text, which ``parse`` takes."""
        return json.dumps({"linear": self.linear, "moe": self.moe, "overrides": dict(self.overrides)})

    def with_override(self, pattern: str, scheme: str) -> str:
        """The same choice as JSON text, with ``scheme`` for layers that match ``pattern``."""
        return SchemeChoice(self.linear, self.moe, {pattern: scheme, **self.overrides}).as_json

    def override(self, names: Sequence[str]) -> str | None:
        """The first pattern that matches a layer, or None.

        Args:
            names: the layer's name and, for a fused layer, the checkpoint's names of its parts.

        Raises:
            SettingsError: a pattern matches some parts of a fused layer, but not all.
        """
        name, *parts = names
        for pattern in self.overrides:
            matched = [part for part in parts if matches(pattern, part)]
            if matches(pattern, name) or (parts and len(matched) == len(parts)):
                return pattern
            if matched:
                others = sorted(set(parts) - set(matched))
                raise SettingsError(
                    f"the pattern {pattern!r} matches {matched[0]}, but {name} is one layer of it and "
                    f"{', '.join(others)}: give them one scheme"
                )
        return None


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the layer of this name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name == pattern or name.endswith(f".{pattern}")


def parse(text: str, variable: str) -> SchemeChoice:
    """Read a choice.

    Args:
        text: a scheme's name or JSON; empty for stock.
        variable: the environment variable or option it comes from, for messages.

    Raises:
        SettingsError: it is not a valid choice. Whether the schemes exist is not checked here.
    """
    text = text.strip()
    if not text.startswith("{"):
        name = text or STOCK
        return SchemeChoice(name, name)
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{variable} is no valid JSON: {error}") from error
    unknown = sorted(set(given) - set(_KEYS))
    if unknown:
        raise SettingsError(f"{variable} has no key {unknown[0]!r}. Its keys are {', '.join(_KEYS)}.")
    ignore, overrides = given.get("ignore", []), given.get("overrides", {})
    if not _is_list_of_names(ignore):
        raise SettingsError(f'"ignore" in {variable} is a list of layer names or patterns, not {ignore!r}.')
    if not isinstance(overrides, dict) or not _is_list_of_names(list(overrides.values())):
        raise SettingsError(f'"overrides" in {variable} maps patterns to names of schemes; it is {overrides!r}.')
    kinds = {key: given.get(key, STOCK) for key in ("linear", "moe")}
    if not _is_list_of_names(list(kinds.values())):
        raise SettingsError(f'"linear" and "moe" in {variable} are names of schemes, not {kinds}.')
    choice = SchemeChoice(**kinds, overrides={**dict.fromkeys(ignore, NONE), **overrides})
    _check_expressions(choice, variable)
    return choice


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _check_expressions(choice: SchemeChoice, variable: str) -> None:
    for pattern in choice.overrides:
        try:
            matches(pattern, "")
        except re.error as error:
            raise SettingsError(f"{variable}: {pattern!r} is no regular expression: {error}") from error
