# SPDX-License-Identifier: Apache-2.0
"""Write files atomically, and the header of a safetensors file."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from sglang_overlay.safetensors_format import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def header(entries: Sequence[Entry]) -> bytes:
    """The header of a safetensors file that contains these tensors in this order."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        described[entry.name] = {
            "dtype": _NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    encoded = json.dumps(described).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The values' bytes, in row-major order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextmanager
def appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once its contents are on disk; a crash leaves only the unfinished file."""
    unfinished = unfinished_name(path)
    with unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync_folder(path.parent)


def unfinished_name(path: Path) -> Path:
    """The name of a file while it is written, which no loader takes for weights."""
    return path.with_name(f".{path.name}.unfinished")


def sync_folder(folder: Path) -> None:
    """Make sure that new names in a folder survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
