# SPDX-License-Identifier: Apache-2.0
"""Which memory stays as it is while an update reads it."""

from __future__ import annotations

import torch

from sglang_overlay.core.capture import storage_key
from sglang_overlay.core.sources import CheckpointSources, oddity


class UpdateSources(CheckpointSources):
    """Also holds tensors that are lent for one call of ``load_weights``.

    Only the updating thread lends and takes back; any thread may ask.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lent: set[int] = set()

    def lend(self, tensor: object) -> None:
        """Note that ``tensor`` stays alive and as it is until ``take_back``."""
        if isinstance(tensor, torch.Tensor) and oddity(tensor) is None:
            self._lent.add(storage_key(tensor))

    def take_back(self) -> None:
        """Forget what was lent. To be called when no job runs."""
        self._lent = set()

    def is_lent(self, tensor: torch.Tensor) -> bool:
        """Whether ``tensor`` is a view of memory that is lent."""
        return storage_key(tensor) in self._lent

    def holds(self, tensor: torch.Tensor) -> bool:
        return self.is_lent(tensor) or super().holds(tensor)
