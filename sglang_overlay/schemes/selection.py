# SPDX-License-Identifier: Apache-2.0
"""The user's choice of schemes, applied to the layers of one model."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_overlay.errors import SchemeError
from sglang_overlay.schemes.choice import SchemeChoice
from sglang_overlay.schemes.scheme import LayerKind

_EXAMPLES = 4


class SchemeSelection:
    """Chooses each layer's scheme, and remembers which patterns have been of use. Belongs to the loading thread."""

    def __init__(self, choice: SchemeChoice) -> None:
        self._choice = choice
        self._used: set[str] = set()
        self._names: list[str] = []

    @property
    def is_stock(self) -> bool:
        """Whether every layer is what stock SGLang makes of it."""
        return self._choice.is_stock

    def scheme_of(self, kind: LayerKind, names: Sequence[str]) -> str:
        """Name of a layer's scheme.

        Args:
            kind: of the layer.
            names: its name, and for a fused layer the checkpoint's names of its parts.

        Raises:
            SettingsError: a pattern matches some parts of a fused layer and not the others.
        """
        self._names.append(names[0])
        pattern = self._choice.override(names)
        if pattern is None:
            return self._choice.linear if kind is LayerKind.LINEAR else self._choice.moe
        self._used.add(pattern)
        return self._choice.overrides[pattern]

    def check_used(self) -> None:
        """Once the model is built: make sure that no pattern is a slip of the pen.

        Raises:
            SchemeError: a pattern has not matched any layer.
        """
        unused = [pattern for pattern in self._choice.overrides if pattern not in self._used]
        if unused and self._names:
            raise SchemeError(
                f"the pattern {unused[0]!r} matches no layer that is quantized. Layers are called, for example, "
                f"{', '.join(self._names[:_EXAMPLES])}."
            )
