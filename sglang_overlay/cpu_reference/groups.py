# SPDX-License-Identifier: Apache-2.0
"""Process groups over gloo alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def without_nccl(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around ``init_model_parallel_group``, whose callers name the argument where they give it."""
    return original(*args, **{**kwargs, "use_pynccl": False})
