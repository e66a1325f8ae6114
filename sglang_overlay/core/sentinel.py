# SPDX-License-Identifier: Apache-2.0
"""Find tensors that nobody writes: mark a few of their elements with a sentinel and look at them afterwards.

This works however, and in whichever thread, a tensor is written. torch's version counter would not: weight loaders
write to ``parameter.data``, which has its own counter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

_MOST_MARKED = 8
"""Elements marked per tensor, spread evenly from the first to (nearly) the last."""

_MARKS = {
    torch.bfloat16: (torch.int16, 0x7FA5),
    torch.float16: (torch.int16, 0x7DA5),
    torch.float32: (torch.int32, 0x7FA55A5A),
}
"""For each dtype, a NaN that no computation produces, as the integer with the same bits."""


def is_watchable(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be marked: bf16, fp16 or fp32, contiguous, with memory and not empty."""
    return tensor.dtype in _MARKS and tensor.numel() > 0 and tensor.is_contiguous() and not tensor.is_meta


def fill(tensor: torch.Tensor) -> None:
    """Mark every element of a high-precision tensor, so that ``clear`` can tell what has not been written since."""
    dtype, mark = _MARKS[tensor.dtype]
    tensor.detach().view(dtype).fill_(mark)


def clear(tensor: torch.Tensor) -> bool:
    """Replace the marks of ``fill`` that have not been overwritten by zeros. Waits for the device.

    Returns:
        Whether there were any.
    """
    dtype, mark = _MARKS[tensor.dtype]
    bits = tensor.detach().view(dtype)
    left = bits == mark
    found = bool(left.any())
    if found:
        bits.masked_fill_(left, 0)
    return found


@dataclass(frozen=True)
class _Marked:
    """``bits``: the marked elements, an integer view of the tensor. ``before``: their values before marking."""

    tensor: torch.Tensor
    bits: torch.Tensor
    before: torch.Tensor
    mark: int


class Sentinels:
    """Sentinels in tensors. Until ``lift``, marked elements that nobody writes are NaN.

    Args:
        tensors: what to watch, by name; tensors that are not ``is_watchable`` are left alone.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._marked = {name: _marked(tensor) for name, tensor in tensors.items() if is_watchable(tensor)}

    def lift(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Restore the values under marks that have not been overwritten. Waits for each device once.

        Args:
            tensors: those in use now, by name; a tensor that has been replaced counts as written.

        Returns:
            Names of tensors in which no marked element has been written.
        """
        untouched = _true({name: _lifted(found) for name, found in self._marked.items()})
        unwritten = [
            name
            for name, found in self._marked.items()
            if tensors.get(name) is found.tensor
            and found.tensor.data_ptr() == found.bits.data_ptr()
            and name in untouched
        ]
        self._marked = {}
        return unwritten


def _marked(tensor: torch.Tensor) -> _Marked:
    dtype, mark = _MARKS[tensor.dtype]
    flat = tensor.detach().view(-1).view(dtype)
    steps = min(_MOST_MARKED, flat.numel()) - 1
    apart = max(1, (flat.numel() - 1) // max(1, steps))
    bits = flat[: steps * apart + 1 : apart]
    marked = _Marked(tensor, bits, bits.clone(), mark)
    bits.fill_(mark)
    return marked


def _lifted(found: _Marked) -> torch.Tensor:
    """Whether all marks are still there, as a bool tensor that is not awaited; restores the values under them."""
    is_marked = found.bits == found.mark
    found.bits.copy_(torch.where(is_marked, found.before, found.bits))
    return is_marked.all()


def _true(answers: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the answers that are true. Synchronizes with each device once."""
    found: set[str] = set()
    for device in {answer.device for answer in answers.values()}:
        here = [name for name, answer in answers.items() if answer.device == device]
        found.update(
            here[number] for number in torch.stack([answers[name] for name in here]).nonzero().flatten().tolist()
        )
    return found
