# SPDX-License-Identifier: Apache-2.0
"""Notes with how many of torch's threads a load ran; for ``LoadJob(recorder=...)``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """Yields a list that has the number once the load has ended."""
    found: list[int] = []
    yield found
    found.append(torch.get_num_threads())
