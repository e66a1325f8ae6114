# SPDX-License-Identifier: Apache-2.0
"""The user's choice of schemes, applied to the layers of one model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from sglang_overlay.errors import SchemeError
from sglang_overlay.schemes.choice import NONE, SchemeChoice, matches
from sglang_overlay.schemes.scheme import LayerKind

logger = logging.getLogger(__name__)

_EXAMPLES = 4


class SchemeSelection:
    """Chooses each layer's scheme, and remembers which patterns have matched. Belongs to the loading thread."""

    def __init__(self, choice: SchemeChoice) -> None:
        self.choice = choice
        self._used: set[str] = set()
        self._names: list[str] = []

    @property
    def is_stock(self) -> bool:
        """Whether every layer is quantized as in stock SGLang."""
        return self.choice.is_stock

    @property
    def is_idle(self) -> bool:
        """Whether no layer has asked for its scheme."""
        return not self._names

    def scheme_of(self, kind: LayerKind, names: Sequence[str]) -> str:
        """Name of a layer's scheme.

        Args:
            kind: of the layer.
            names: its name and, for a fused layer, the checkpoint's names of its parts.

        Raises:
            SettingsError: a pattern matches some parts of a fused layer, but not all.
        """
        self._names.append(names[0])
        pattern = self.choice.override(names)
        if pattern is None:
            return self.choice.linear if kind is LayerKind.LINEAR else self.choice.moe
        self._used.add(pattern)
        return self.choice.overrides[pattern]

    def check_used(self, modules: Iterable[str], *, is_part: bool = False) -> None:
        """Make sure, once the model is built, that no pattern is a typo.

        Args:
            modules: names of all the model's modules, quantized or not. ``none`` for a module that is never quantized,
                such as a head, is not a mistake.
            is_part: whether the user may have meant a layer of another model (a draft's target) or pipeline stage.
                Then a pattern without a match is only a warning.

        Raises:
            SchemeError: a pattern has not matched any layer.
        """
        if self.is_idle:
            return
        names = list(modules)
        for pattern, scheme in self.choice.overrides.items():
            if pattern in self._used or (scheme == NONE and any(matches(pattern, name) for name in names)):
                continue
            slip = (
                f"the pattern {pattern!r} matches no layer that is quantized. Layers are called, for example, "
                f"{', '.join(self._names[:_EXAMPLES])}."
            )
            if not is_part:
                raise SchemeError(slip)
            logger.warning("StreamFP8: in this part of the model %s", slip)
