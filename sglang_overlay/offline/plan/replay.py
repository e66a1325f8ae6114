# SPDX-License-Identifier: Apache-2.0
"""Units of one parameter take the same operations: run those of two, and count them again for the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_overlay.core.executor import Executor

if TYPE_CHECKING:
    from sglang_overlay.core.quantizers import UnitQuantizer
    from sglang_overlay.core.staging import Piece
    from sglang_overlay.offline.plan.account import Account, Taken


class Replaying(Executor):
    """An ``Executor`` for tensors without memory, whose quantizers compute twice for each kind of unit.

    A model has up to a hundred thousand units, and an operation on a tensor without memory takes a tenth of a
    millisecond.

    Args:
        account: what quantizing takes is counted in.
    """

    def __init__(self, account: Account) -> None:
        self._account = account

    def quantizer(self, quantizer: UnitQuantizer) -> UnitQuantizer:
        return _ReplayedQuantizer(quantizer, self._account)


class _ReplayedQuantizer:
    """Quantizes one parameter. Units of a kind have equal shapes, strides and pieces."""

    def __init__(self, quantizer: UnitQuantizer, account: Account) -> None:
        self._quantizer = quantizer
        self._account = account
        self._seen: set[Hashable] = set()
        self._taken: dict[Hashable, tuple[Taken, Any]] = {}

    def could_be(self, piece: Piece, weight: torch.Tensor, scale: torch.Tensor) -> bool:
        return self._quantizer.could_be(piece, weight, scale)

    def quantize(self, pieces: Sequence[Piece], weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor | float:
        tensors = (*(piece.values for piece in pieces), weight, scale)
        kind = (*(piece.box for piece in pieces), *map(_described, tensors))
        return self._replayed(kind, lambda: self._quantizer.quantize(pieces, weight, scale), weight)

    def quantize_run(self, values: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        kind = tuple(map(_described, (values, weight, scale)))
        found = self._replayed(kind, lambda: self._quantizer.quantize_run(values, weight, scale), weight)
        assert isinstance(found, torch.Tensor)
        return found

    def _replayed(
        self, kind: Hashable, quantize: Callable[[], torch.Tensor | float], weight: torch.Tensor
    ) -> torch.Tensor | float:
        known = self._taken.get(kind)
        if known is None:
            found, taken = self._account.watched(quantize)
            if kind in self._seen:
                like = (tuple(found.shape), found.dtype, found.device) if isinstance(found, torch.Tensor) else found
                self._taken[kind] = taken, like
            # The first call of an operation with such tensors also makes what FakeTensorMode remembers of it.
            self._seen.add(kind)
            return found
        taken, like = known
        self._account.take(taken)
        self._account.written(weight, weight.numel())
        if isinstance(like, float):
            return like
        shape, dtype, device = like
        return torch.empty(shape, dtype=dtype, device=device)


def _described(tensor: torch.Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.type
