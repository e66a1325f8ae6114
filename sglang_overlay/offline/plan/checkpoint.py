# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as its headers describe it: files, and the names, shapes and dtypes of their tensors."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from sglang_overlay.errors import StreamFP8Error
from sglang_overlay.offline.plan.job import Order
from sglang_overlay.safetensors_format import DTYPES, INDEX, shard_name, split_by_size

_LENGTH = 8


class CheckpointError(StreamFP8Error):
    """The headers of a checkpoint cannot be read, or lack something."""


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors header says of one tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WeightFile:
    """One file of a checkpoint."""

    name: str
    tensors: tuple[TensorHeader, ...]


@dataclass(frozen=True)
class Checkpoint:
    """All files of a checkpoint, sorted by name.

    Attributes:
        files: with their tensors, sorted by name, as SGLang's loader reads them.
        source: where this information comes from, for people.
    """

    files: tuple[WeightFile, ...]
    source: str

    @property
    def tensors(self) -> Iterator[TensorHeader]:
        """All tensors."""
        return (tensor for file in self.files for tensor in file.tensors)

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(prod(tensor.shape) for tensor in self.tensors)

    def read_by(self, order: Order, tp_rank: int, tp_size: int) -> list[WeightFile]:
        """The files in the order in which a rank reads them.

        ``sorted`` is SGLang's default. ``staggered`` is ``SGLANG_SORT_WEIGHT_FILES=1``: in each group of as many files
        as there are ranks, each rank starts with a different one. ``shuffled`` is the worst case of a folder's own
        order (``SGLANG_SORT_WEIGHT_FILES=-1``): no model order at all, the same in every plan.
        """
        files = list(self.files)
        if order == "shuffled":
            random.Random(0).shuffle(files)
        elif order == "staggered":
            groups = [files[start : start + tp_size] for start in range(0, len(files), tp_size)]
            files = [group[(place + tp_rank) % len(group)] for group in groups for place in range(len(group))]
        return files


def read_headers(folder: Path) -> Checkpoint:
    """Read the headers of all safetensors files in a folder; no weight is read.

    Raises:
        CheckpointError: there are none, or one cannot be read.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder} has no *.safetensors files to read headers from")
    files = tuple(WeightFile(path.name, tuple(_header(path))) for path in paths)
    return Checkpoint(files, f"headers of {len(files)} files")


def _header(path: Path) -> Iterator[TensorHeader]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(_LENGTH))
            found = json.loads(file.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"the header of {path} cannot be read: {error}") from error
    for name in sorted(found.keys() - {"__metadata__"}):
        entry = found[name]
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {name} has dtype {entry['dtype']}, which is not known here")
        yield TensorHeader(name, tuple(entry["shape"]), DTYPES[entry["dtype"]])


def read_index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, from ``model.safetensors.index.json``; None if there is no such index.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the index {path} cannot be read: {error!r}") from error
    return found


def arranged(checkpoint: Checkpoint, index: Mapping[str, str]) -> Checkpoint:
    """``checkpoint`` arranged in the files of an index; tensors that either of the two lacks are left out."""
    groups: dict[str, list[TensorHeader]] = {}
    for tensor in sorted(checkpoint.tensors, key=lambda tensor: tensor.name):
        if tensor.name in index:
            groups.setdefault(index[tensor.name], []).append(tensor)
    files = tuple(WeightFile(name, tuple(groups[name])) for name in sorted(groups))
    unknown = len(index) - sum(len(file.tensors) for file in files)
    note = f"; {unknown} of its tensors have no known shape" if unknown else ""
    return Checkpoint(files, f"{checkpoint.source}, in the files of the index{note}")


def split_into_files(tensors: Sequence[TensorHeader], most: int) -> tuple[WeightFile, ...]:
    """Tensors split into files of at most ``most`` bytes each, in the order given, like ``save_pretrained``."""
    groups = split_by_size(tensors, lambda tensor: tensor.size, most)
    return tuple(
        WeightFile(shard_name(number, len(groups)), tuple(sorted(group, key=lambda t: t.name)))
        for number, group in enumerate(groups, 1)
    )
