# SPDX-License-Identifier: Apache-2.0
"""Plan how each checkpoint tensor is stored, and in which file of the export."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_overlay.core.regions import extent
from sglang_overlay.errors import ExportError
from sglang_overlay.offline.export.source import SourceTensor
from sglang_overlay.offline.export.weight_file import Entry
from sglang_overlay.offline.tracing import Destination, Trace
from sglang_overlay.safetensors_format import shard_name, split_by_size
from sglang_overlay.schemes.stored_format import StoredFormat


@dataclass(frozen=True)
class Item:
    """A checkpoint tensor and what is stored for it: the tensor itself, or values and scales.

    Attributes:
        source: the tensor.
        entries: the stored tensors.
        dtype: the dtype that values are cast to before they are quantized; None if the tensor is copied.
    """

    source: SourceTensor
    entries: tuple[Entry, ...]
    dtype: torch.dtype | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether it is stored as values and scales."""
        return self.dtype is not None

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True)
class Shard:
    """A file of the export and its items, in order."""

    name: str
    items: tuple[Item, ...]

    @property
    def entries(self) -> list[Entry]:
        """All tensors in it."""
        return [entry for item in self.items for entry in item.entries]


@dataclass(frozen=True)
class ExportPlan:
    """Everything that an export writes, except for copied files.

    Attributes:
        shards: files with weights.
        config: contents of ``config.json``.
    """

    shards: tuple[Shard, ...]
    config: Mapping[str, Any]

    @property
    def items(self) -> list[Item]:
        """All tensors of the checkpoint."""
        return [item for shard in self.shards for item in shard.items]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored weights."""
        return sum(item.nbytes for item in self.items)


def make_plan(
    tensors: Sequence[SourceTensor], config: Mapping[str, Any], trace: Trace, form: StoredFormat, most: int
) -> ExportPlan:
    """Plan an export.

    Args:
        tensors: of the checkpoint, in the order in which they are stored.
        config: of the checkpoint.
        trace: where the tensors go in the model.
        form: how quantized tensors are stored.
        most: most bytes in a shard; a single larger tensor gets its own.

    Raises:
        ExportError: a tensor would have other values in the export than in an online load.
    """
    items = [_item(tensor, trace.regions.get(tensor.name, ()), form) for tensor in tensors]
    if not any(item.is_quantized for item in items):
        raise ExportError(f"{trace.architecture} has no layer that would be quantized, so there is nothing to export")
    ignored = [_module(item.source.name) for item in items if not item.is_quantized and _is_matrix(item.source)]
    _check_ignored(ignored, trace.layers)
    quantization = {**form.config, form.ignored: ignored}
    return ExportPlan(_shards(items, most), {**config, "quantization_config": quantization})


def _item(tensor: SourceTensor, regions: Sequence[Destination], form: StoredFormat) -> Item:
    if not regions:
        return Item(tensor, (Entry(tensor.name, tensor.shape, tensor.dtype),))
    dtype = _dtype_loaded(tensor, regions)
    for region in regions:
        _check_region(tensor, region, form)
    try:
        scales = Entry(tensor.name + form.scale, form.scale_shape(tensor.shape), torch.float32)
    except ValueError as error:
        raise ExportError(f"{tensor.name} cannot have scales: {error}") from error
    return Item(tensor, (Entry(tensor.name, tensor.shape, form.dtype), scales), dtype)


def _dtype_loaded(tensor: SourceTensor, regions: Sequence[Destination]) -> torch.dtype:
    """The dtype in which an online load quantizes the tensor."""
    if not tensor.dtype.is_floating_point:
        raise ExportError(
            f"{tensor.name}, which goes into {regions[0].parameter}, is of dtype {tensor.dtype}. A checkpoint whose "
            "weights are integers is quantized already: export the unquantized one."
        )
    dtypes = {region.dtype: region.parameter for region in regions}
    if len(dtypes) > 1:
        places = " and ".join(f"{parameter} of dtype {dtype}" for dtype, parameter in dtypes.items())
        raise ExportError(f"{tensor.name} goes into {places}, which have different scales: it can be stored with one")
    return regions[0].dtype


def _check_region(tensor: SourceTensor, region: Destination, form: StoredFormat) -> None:
    """Make sure that the tensor, quantized alone, gets the same scales as in the parameter."""
    where = f"{tensor.name} {list(tensor.shape)} goes into {region.parameter} {list(region.shape)}"
    if extent(region.box)[-2:] != tensor.shape or region.box[-1] != (0, region.shape[-1]):
        raise ExportError(
            f"{where} as {list(extent(region.box))}. Only matrices that are loaded whole can be exported. Where all "
            "experts are stored in one tensor, store them one by one."
        )
    first, last = region.box[-2]
    if first % form.rows or (last != region.shape[-2] and last % form.rows):
        raise ExportError(
            f"{where} from row {first} to {last}, which cuts a block of {form.rows} rows: the online load gives that "
            f'block one scale, a checkpoint two. Leave the layer out: --scheme \'{{..., "ignore": '
            f'["{region.parameter.rpartition(".")[0]}"]}}\'.'
        )


def _is_matrix(tensor: SourceTensor) -> bool:
    return tensor.name.endswith(".weight") and len(tensor.shape) >= 2


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _check_ignored(ignored: Sequence[str], layers: Sequence[str]) -> None:
    """Make sure that no quantized layer is inside an ignored module: SGLang would ignore it too."""
    for layer in layers:
        outer = next((module for module in ignored if f".{layer}.".find(f".{module}.") >= 0), None)
        if outer is not None:
            raise ExportError(f"{outer} is not quantized, and {layer} inside it is: no config can say that")


def _shards(items: Sequence[Item], most: int) -> tuple[Shard, ...]:
    groups = split_by_size(items, lambda item: item.nbytes, most)
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(items)),)
    return tuple(Shard(shard_name(number, len(groups)), tuple(group)) for number, group in enumerate(groups, 1))
