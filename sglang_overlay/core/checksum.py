# SPDX-License-Identifier: Apache-2.0
"""A checksum of tensors that is computed where they lie, in one pass, with next to no memory.

1. A tensor's bytes are read as 8-byte words, in rows of ``COLUMNS``. Of whole rows, only the sums of each row and of
   each column are kept. A change of fewer than four words changes some of them: to change none, it would have to add
   and to subtract the same in the four corners of a rectangle.
2. Each sum, with its place, goes through the finalizer of SplitMix64, in which each bit depends on all others.
3. The results are added up. All arithmetic is modulo 2^64 and of integers, so the order of additions has no influence:
   each device, and any number of threads, finds the same.

It tells whether replicas differ by accident. It is no protection against somebody who chooses the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

COLUMNS = 2048
PIECE_ROWS = 1024
"""Rows that are summed at once, 16 MB: read from memory in one direction, from the cache of a GPU in the other."""
_WORD = torch.int64
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_ROUNDS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))
_LAST_SHIFT = 31


def checksums(groups: Iterable[Iterable[torch.Tensor]]) -> list[int]:
    """A checksum of 64 bits for each group of tensors. Devices are waited for once, at the end.

    Args:
        groups: tensors of any dtypes on any devices, but meta. Only their bytes count, in the order of their memory
            (that of their elements if they have gaps); no names, dtypes or shapes.
    """
    found = [_checksum(group) for group in groups]
    with torch.inference_mode():
        # One copy for each device, not for each group.
        devices = dict.fromkeys(value.device for value in found)
        values = {
            device: iter(torch.stack([one for one in found if one.device == device]).tolist()) for device in devices
        }
    return [next(values[one.device]) & _MASK for one in found]


@torch.inference_mode()
def _checksum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    parts = [part for tensor in tensors for part in _condensed(tensor) if len(part)]
    if not parts:
        return torch.zeros((), dtype=_WORD)
    words = torch.cat([part.to(parts[0].device) for part in parts])
    places = torch.arange(1, len(words) + 1, dtype=_WORD, device=words.device)
    return _mixed(words.add_(places.mul_(_GAMMA))).sum()


def _condensed(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Vectors of words that stand for a tensor's bytes."""
    raw = _bytes_of(tensor)
    whole = len(raw) // _WORD.itemsize
    words, rest = raw[: whole * _WORD.itemsize].view(_WORD), raw[whole * _WORD.itemsize :]
    rows = len(words) // COLUMNS
    # One row would be summed to itself.
    if rows > 1:
        yield from _sums(words[: rows * COLUMNS].view(rows, COLUMNS))
        words = words[rows * COLUMNS :]
    yield words
    yield rest.to(_WORD)


def _sums(matrix: torch.Tensor) -> Iterator[torch.Tensor]:
    columns = torch.zeros(COLUMNS, dtype=_WORD, device=matrix.device)
    for piece in matrix.split(PIECE_ROWS):
        yield piece.sum(dim=1)
        columns += piece.sum(dim=0)
    yield columns


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor without gaps, in the order of memory; else those of a copy without gaps."""
    tensor = tensor.detach()
    if not _is_dense(tensor.shape, tensor.stride()):
        tensor = tensor.contiguous()
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    # Words can be read at their own multiples only.
    return flat if flat.storage_offset() % _WORD.itemsize == 0 else flat.clone()


def _is_dense(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def _mixed(words: torch.Tensor) -> torch.Tensor:
    for shift, factor in _ROUNDS:
        words = (words ^ _shifted(words, shift)).mul_(factor)
    return words ^ _shifted(words, _LAST_SHIFT)


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    """``words`` shifted to the right, with zeros: torch's integers have a sign, which a shift repeats."""
    return (words >> by).bitwise_and_((1 << (64 - by)) - 1)
