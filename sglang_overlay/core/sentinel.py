# SPDX-License-Identifier: Apache-2.0
"""Tell which tensors nobody writes: a few of their elements are marked, and looked at again afterwards.

It does not matter how or by which thread a tensor is written. torch's version counter would not tell: weight loaders
write to ``parameter.data``, which has a counter of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

_MOST_MARKED = 8
"""Elements marked in a tensor, evenly spread from the first to the last or nearly so."""

_MARKS = {
    torch.bfloat16: (torch.int16, 0x7FA5),
    torch.float16: (torch.int16, 0x7DA5),
    torch.float32: (torch.int32, 0x7FA55A5A),
}
"""A NaN of each dtype that no computation gives, as the integer with the same bits."""


def is_watchable(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be marked: in high precision, contiguous, with memory and not empty."""
    return tensor.dtype in _MARKS and tensor.numel() > 0 and tensor.is_contiguous() and not tensor.is_meta


def fill(tensor: torch.Tensor) -> None:
    """Mark every element of a high-precision tensor, so that ``clear`` can tell what has not been written since."""
    dtype, mark = _MARKS[tensor.dtype]
    tensor.detach().view(dtype).fill_(mark)


def clear(tensor: torch.Tensor) -> bool:
    """Put zeros in place of what is left of ``fill``. Waits for the device.

    Returns:
        Whether anything was left.
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
    """Attributes: ``bits``, the marked elements as integers, a view of the tensor, and what they were before."""

    tensor: torch.Tensor
    bits: torch.Tensor
    before: torch.Tensor
    mark: int


class Sentinels:
    """Sentinels in tensors. Between here and ``lift``, elements that nobody writes are NaN.

    Args:
        tensors: what to watch, by name; those that are not ``is_watchable`` are left alone.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._marked = {name: _marked(tensor) for name, tensor in tensors.items() if is_watchable(tensor)}

    def lift(self, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Put back what the marks have replaced, and has not been written since. Waits for the device once.

        Args:
            tensors: those that are in use by now, by name; one in place of another has been written.

        Returns:
            Names of tensors of which no marked element has been written.
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
    """Whether all marks are still there, as a tensor that need not be awaited; puts back what they replaced."""
    is_marked = found.bits == found.mark
    found.bits.copy_(torch.where(is_marked, found.before, found.bits))
    return is_marked.all()


def _true(answers: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the answers that are yes. Each device is asked once."""
    found: set[str] = set()
    for device in {answer.device for answer in answers.values()}:
        here = [name for name, answer in answers.items() if answer.device == device]
        found.update(
            here[number] for number in torch.stack([answers[name] for name in here]).nonzero().flatten().tolist()
        )
    return found
