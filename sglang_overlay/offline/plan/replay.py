# SPDX-License-Identifier: Apache-2.0
"""Units of one kind take the same operations: run those of two, and count what they take again for the others."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from sglang_overlay.core.executor import Executor
from sglang_overlay.offline.plan.account import CUDA_BLOCK, Account, Cost

if TYPE_CHECKING:
    from sglang_overlay.core.quantizers import UnitQuantizer
    from sglang_overlay.core.staging import Piece


class Replaying(Executor):
    """An ``Executor`` for tensors without memory. Quantizers run for the first two units of each kind of a parameter:
    those of equal shapes, strides and pieces. What the second takes is counted for the rest.

    A model has up to a hundred thousand units, and an operation on a tensor without memory takes a tenth of a
    millisecond.

    Args:
        account: what quantizing takes is counted in.
    """

    def __init__(self, account: Account) -> None:
        self._account = account

    def quantizer(self, quantizer: UnitQuantizer) -> UnitQuantizer:
        return _replayed_class(type(quantizer))(quantizer, self._account)


@cache
def _replayed_class(kind: type) -> type[_ReplayedQuantizer]:
    """A class for each class of quantizers: ``ParameterStream.kind`` tells kernels apart by it."""
    return type(f"Replayed{kind.__name__}", (_ReplayedQuantizer,), {})


class _ReplayedQuantizer:
    """Quantizes one parameter."""

    def __init__(self, quantizer: UnitQuantizer, account: Account) -> None:
        self._quantizer = quantizer
        self._account = account
        self._seen: set[Hashable] = set()
        self._known: dict[Hashable, tuple[Cost, Any]] = {}

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
        if kind not in self._known:
            return self._measured(kind, quantize, weight)
        cost, like = self._known[kind]
        self._account.repeat(cost)
        self._account.written(weight, weight.numel())
        if isinstance(like, float):
            return like
        shape, dtype, device = like
        return torch.empty(shape, dtype=dtype, device=device)

    def _measured(
        self, kind: Hashable, quantize: Callable[[], torch.Tensor | float], weight: torch.Tensor
    ) -> torch.Tensor | float:
        found, cost = self._account.measured(quantize)
        result = 0 if isinstance(found, float) else found.nbytes + CUDA_BLOCK
        # Whatever else a quantizer keeps has to be counted for each unit. The first call also makes what
        # ``FakeTensorMode`` remembers of an operation.
        if kind in self._seen and cost.kept <= weight.nbytes + result:
            self._known[kind] = cost, found if isinstance(found, float) else (found.shape, found.dtype, found.device)
        self._seen.add(kind)
        return found


def _described(tensor: torch.Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device.type
