# SPDX-License-Identifier: Apache-2.0
"""How this package stands around functions of SGLang's."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def streaming_hook(hook: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Call ``hook(original, *args, **kwargs)`` in place of the decorated function.

    Args:
        hook: ``module:function`` of this package, imported with the first call: it imports what is decorated.
    """

    def decorate(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return _resolved(hook)(original, *args, **kwargs)

        return call

    return decorate


@functools.cache
def _resolved(hook: str) -> Callable[..., Any]:
    module, _, name = hook.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)
