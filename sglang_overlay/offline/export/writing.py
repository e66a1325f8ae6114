# SPDX-License-Identifier: Apache-2.0
"""Write a shard: quantize and write rows as they are read, so that memory does not grow with the tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from sglang_overlay.offline.export.plan import Item, Shard
from sglang_overlay.offline.export.source import Files
from sglang_overlay.offline.export.weight_file import appearing, as_bytes, header
from sglang_overlay.schemes.stored_format import StoredFormat

RUN_ELEMENTS = 1 << 21
"""Elements quantized at once: 4 MiB of bf16."""

Written = Callable[[int], None]
"""Called with the number of bytes written."""


def write_shard(shard: Shard, form: StoredFormat, files: Files, path: Path, written: Written) -> None:
    """Write a shard to ``path``, which appears only when it is complete and on disk."""
    with appearing(path) as file:
        file.write(header(shard.entries))
        for item in shard.items:
            for part in _contents(item, form, files):
                raw = as_bytes(part)
                file.write(raw)
                written(len(raw))


def shard_bytes(shard: Shard) -> int:
    """Size of a shard's file in bytes."""
    return len(header(shard.entries)) + sum(entry.nbytes for entry in shard.entries)


def _contents(item: Item, form: StoredFormat, files: Files) -> Iterator[torch.Tensor]:
    tensor = files.open(item.source.file).get_tensor(item.source.name)
    if item.dtype is None:
        rows = tensor.reshape(-1, 1) if tensor.ndim < 2 else tensor
        yield from rows.split(max(1, RUN_ELEMENTS // max(1, rows[:1].numel())))
        return
    weight, scale = item.entries
    scales = torch.empty(scale.shape, dtype=scale.dtype)
    height = form.rows * max(1, RUN_ELEMENTS // (form.rows * weight.shape[-1]))
    filled = 0
    for run in tensor.split(height):
        factors = torch.empty(form.scale_shape(tuple(run.shape)), dtype=scale.dtype)
        values = torch.empty(run.shape, dtype=weight.dtype)
        # Cast first, like an online load: digits that the parameter does not keep must not affect the scales.
        form.quantize(run.to(item.dtype), values, factors)
        yield values
        scales[filled : filled + len(factors)].copy_(factors)
        filled += len(factors)
    yield scales
