# SPDX-License-Identifier: Apache-2.0
"""Conventions of safetensors checkpoints: dtypes, the index, and how weights are distributed over files."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

Item = TypeVar("Item")

INDEX = "model.safetensors.index.json"
"""The index, which says which file a tensor is in: ``{"weight_map": {tensor: file}}``."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their names in a file's header."""


def split_by_size(items: Iterable[Item], size_of: Callable[[Item], int], most: int) -> list[list[Item]]:
    """Items in groups of at most ``most`` bytes, in the order given; a larger item gets a group of its own."""
    groups: list[list[Item]] = [[]]
    filled = 0
    for item in items:
        size = size_of(item)
        if groups[-1] and filled + size > most:
            groups.append([])
            filled = 0
        groups[-1].append(item)
        filled += size
    return groups


def shard_name(number: int, count: int) -> str:
    """Name of the ``number``-th of ``count`` files, counted from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"
